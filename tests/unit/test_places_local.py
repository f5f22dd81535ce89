"""Submission to this machine: the scripts, and that they run."""

from __future__ import annotations

import subprocess

import pytest

from cluster.places import local as to_local
from sm_train.errors import UserError
from tests.submitting import job, project, require_golden

__all__ = ["project"]

pytestmark = pytest.mark.usefixtures("project")
PRETRAIN = ("pretrain", "configs/pretrain/llama31-8b.yaml")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("local-precompute.sh", ("precompute", "configs/precompute/librispeech.yaml")),
        ("local-retarget.sh", ("retarget", "data/shards", "--llm", "some/llm", "--name", "a name")),
        ("local-pretrain.sh", (*PRETRAIN, "ranks_per_node=4", "gpus_per_node=4")),
        ("local-pretrain-nodes.sh", (*PRETRAIN, "nodes=2", "ranks_per_node=2", "master_addr=10.0.0.1")),
        ("local-evaluate.sh", ("evaluate", "configs/evaluate/llama31-8b.yaml")),
    ],
)
def test_the_script_is_as_shown(name: str, words: tuple[str, ...]) -> None:
    require_golden(name, to_local.script(job(*words)))


def test_a_node_s_script_asks_for_its_number() -> None:
    script = to_local.script(job(*PRETRAIN, "nodes=2", "master_addr=10.0.0.1"))
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert ran.returncode != 0
    assert "give the number of this node, 0 to 1" in ran.stderr


def test_several_nodes_need_an_address() -> None:
    with pytest.raises(UserError, match="master_addr=, the first node's address"):
        to_local.check(job(*PRETRAIN, "nodes=2"))
