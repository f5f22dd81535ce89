"""The command line of a submission."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cluster import submit
from cluster.submission import SCHEMAS, SubmitConfig
from sm_train.errors import UserError
from tests.submitting import project

__all__ = ["project"]


def test_no_key_belongs_to_both_a_submission_and_a_stage() -> None:
    own = {field.name for field in dataclasses.fields(SubmitConfig)}
    for schema in filter(None, SCHEMAS.values()):
        assert not own & {field.name for field in dataclasses.fields(schema)}


def test_words_go_where_their_key_is() -> None:
    words = ["c.yaml", "nodes=2", "slurm.time=1:00:00", "engine.name=deepspeed", "--llm", "x"]
    own, stages = submit.split(words)
    assert own == ["nodes=2", "slurm.time=1:00:00"]
    assert stages == ["c.yaml", "engine.name=deepspeed", "--llm", "x"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "c.yaml"], "stage is 'train'; it must be one of precompute, retarget, pretrain, tune, evaluate"),
        (["pretrain"], "no config file given"),
        (["pretrain", "nowhere.yaml"], "config file nowhere.yaml does not exist"),
        (["pretrain", "configs/pretrain/miniature.yaml", "to=moon"], "to is 'moon'; it must be one of local, ray"),
        (["pretrain", "configs/pretrain/miniature.yaml", "nodes=0"], "nodes is 0; it must be at least 1"),
        (["pretrain", "configs/pretrain/miniature.yaml", "node=2"], "unknown key 'node'"),
        (["pretrain", "configs/pretrain/miniature.yaml", "slurm.tiem=1"], "unknown key 'slurm.tiem'"),
        (["pretrain", "configs/pretrain/miniature.yaml", "after=12"], "only slurm starts a job after another"),
        (["retarget", "--llm", "x"], "retarget: give the shard set first"),
    ],
)
def test_a_mistake_is_named(project: Path, words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        submit.read(words)
