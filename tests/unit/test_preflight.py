"""What is refused of a submission before anything is written or sent."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster import preflight, submit
from sm_train.errors import UserError
from tests.submitting import job, project
from tests.training import shard_set, write_config

__all__ = ["project"]

pytestmark = pytest.mark.usefixtures("project")
PRETRAIN, TUNE = ("pretrain", "configs/pretrain/llama31-8b.yaml"), ("tune", "configs/tune/llama31-8b.yaml")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*PRETRAIN, "nodes=3", "ranks_per_node=3"), r"9 ranks \(3 nodes of 3\) do not divide; ask for 1, 2"),
        ((*TUNE, "ranks_per_node=5"), "5 ranks"),
        ((*PRETRAIN, "ranks_per_node=2", "gpus_per_node=4"), "a rank has one GPU"),
        ((*PRETRAIN, "engine.device=cuda"), "engine.device is 'cuda' and gpus_per_node 0"),
        ((*PRETRAIN, "engine.device=cpu", "gpus_per_node=1"), "which would stand idle"),
        (("evaluate", "configs/evaluate/llama31-8b.yaml", "nodes=2"), "evaluate to local runs on one machine"),
        (("precompute", "configs/precompute/miniature.yaml", "ranks_per_node=2"), "only pretrain and tune have ranks"),
    ],
)
def test_what_cannot_run_is_refused(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        preflight.check(job(*words))


def test_what_can_run_passes() -> None:
    preflight.check(job(*PRETRAIN, "nodes=2", "ranks_per_node=2", "gpus_per_node=2", "gpu=V100-32"))


def test_what_does_not_fit_its_gpus_is_refused_with_what_would(project: Path) -> None:
    asked = ["ranks_per_node=2", "gpus_per_node=2", "to=slurm", "batch.frames=300000"]
    with pytest.raises(
        UserError, match=r"a rank would need .* GiB .*; by the same formula it fits with engine\.split="
    ):
        preflight.check(job(*PRETRAIN, *asked, "gpu=V100-32"))
    with pytest.raises(UserError, match="GPU 'V10' is not known; name one of V100-32"):
        preflight.check(job(*PRETRAIN, *asked, "gpu=V10"))
    preflight.check(job(*PRETRAIN, *asked))  # nothing is known of the machine


def test_what_does_not_fit_this_machine_is_refused(project: Path) -> None:
    path = write_config(project / "run.yaml", shard_set(project / "set", 24), mapper={"feed_forward": 10**9})
    with pytest.raises(UserError, match="and the host memory has"):
        preflight.check(submit.read(["pretrain", str(path)]))


def test_inputs_must_be_there_unless_another_job_makes_them(project: Path) -> None:
    path = write_config(project / "run.yaml", "set")
    with pytest.raises(UserError, match="shard set set does not exist, or is not complete; run precompute first"):
        preflight.check(submit.read(["pretrain", str(path)]))
    preflight.check(submit.read(["pretrain", str(path), "to=slurm", "after=12"]))
    shard_set(project / "set", 24)
    preflight.check(submit.read(["pretrain", str(path)]))
    words = ["precompute", "configs/precompute/miniature.yaml", "manifest=no.parquet"]
    with pytest.raises(UserError, match=r"manifest is 'no\.parquet', which does not exist here"):
        preflight.check(submit.read(words))
