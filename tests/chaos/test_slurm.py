"""What becomes of SLURM's jobs whose ranks, nodes and signals come and go; a real scheduler of two nodes."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from sm_train.precompute import PrecomputeConfig
from tests import training
from tests.integration.conftest import cfg, reference
from tests.integration.precompute_jobs import command_file, hashes, parts, wait_until
from tests.slurm.scheduler import Scheduler, slurm

__all__ = ["cfg", "reference", "slurm"]

pytestmark = pytest.mark.chaos
LOOP = {"steps": 12, "save_every": 5, "validate_every": 4, "log_every": 1}


@pytest.fixture
def waiting(slurm: Scheduler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, str]:
    """A run of two nodes that waits in its step 7, the file that lets it go on, and its job."""
    path = training.write_config(tmp_path / "run.yaml", training.shard_set(tmp_path / "shards", 24), loop=LOOP)
    go_on = tmp_path / "go-on"
    monkeypatch.setenv("TEST_PAUSE", f"7:{go_on}")
    (job,) = slurm.submit("pretrain", str(path), "nodes=2", "slurm.time=30", "slurm.max_requeues=1")
    run = path.with_suffix("")
    wait_for_step_6(run)
    return run, go_on, job


def wait_for_step_6(run: Path, attempt: int = 1) -> None:
    """Until an attempt has done it, and the checkpoint of step 5 is there."""
    path = run / "metrics.jsonl"
    wait_until(
        lambda: path.exists() and [(v["attempt"], v["step"]) for v in training.metrics(run)][-1:] == [(attempt, 6)]
    )
    wait_until(lambda: os.readlink(run / "checkpoints/latest") == "step-5")


def ranks(run: Path) -> list[psutil.Process]:
    """The processes that train a run."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        found += [process] if "sm_train.pretrain" in line and any(str(run) in word for word in line) else []
    return found


def test_a_rank_that_is_killed_costs_a_restart_and_the_second_time_without_progress_the_job(
    slurm: Scheduler, waiting: tuple[Path, Path, str]
) -> None:
    run, _, job = waiting
    ranks(run)[1].kill()
    wait_for_step_6(run, attempt=2)
    ranks(run)[0].kill()
    assert slurm.wait(job) == "FAILED"
    said = slurm.log(run, job)
    assert "queued again: exit code 137; 0 starts without progress before" in said
    assert "1 starts again brought no progress (SM_MAX_REQUEUES=1)" in said


def test_a_lost_node_costs_a_restart(slurm: Scheduler, waiting: tuple[Path, Path, str]) -> None:
    run, go_on, job = waiting
    slurm.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    wait_until(lambda: slurm.state(job) == "PENDING")
    go_on.touch()
    slurm.run("scontrol", "update", "nodename=n2", "state=resume")
    assert slurm.wait(job) == "COMPLETED", slurm.logs(run)
    assert slurm.field(job, "Restarts") == "1"
    assert training.metrics(run)[-1]["step"] == LOOP["steps"]


def test_a_job_that_is_cancelled_saves_and_does_not_come_back(
    slurm: Scheduler, waiting: tuple[Path, Path, str]
) -> None:
    run, _, job = waiting
    slurm.run("scancel", job)
    wait_until(lambda: not ranks(run))
    assert slurm.wait(job) == "CANCELLED"
    assert slurm.field(job, "Restarts") == "0"
    assert "saved at step" in slurm.log(run, job)


def test_a_task_of_an_array_that_is_signalled_goes_on(
    slurm: Scheduler, cfg: PrecomputeConfig, reference: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "set"
    monkeypatch.setenv("TEST_SLOW_S", "1")
    words = [str(command_file(cfg, tmp_path)), f"out={out}", "slurm.tasks=2", "slurm.cpus=1", "slurm.time=30"]
    array, joining = slurm.submit("precompute", *words)
    wait_until(lambda: parts(out) >= 2)
    slurm.run("scancel", "--signal=TERM", f"{array}_0")  # as SLURM signals before the limit: the step's tasks alone
    assert slurm.wait(joining) == "COMPLETED", slurm.logs(out)
    assert slurm.field(f"{array}_0", "Restarts") == "1"
    assert "queued again: exit code 130" in slurm.log(out, f"{array}_0")
    assert "queued again" not in slurm.log(out, f"{array}_1")
    beside = ("submitted/", "log-")
    assert {name: found for name, found in hashes(out).items() if not name.startswith(beside)} == reference


def test_precompute_over_a_ray_of_the_job_s_own_signalled_once(
    slurm: Scheduler, cfg: PrecomputeConfig, reference: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "set"
    for name, value in {
        "TEST_SLOW_S": "1",
        "TMPDIR": str(slurm.folder),
        "RAY_OBJECT_STORE_BYTES": str(80 << 20),
    }.items():
        monkeypatch.setenv(name, value)
    words = ["slurm.ray=true", "nodes=2", "slurm.cpus=2", "slurm.time=30"]
    (job,) = slurm.submit("precompute", str(command_file(cfg, tmp_path)), f"out={out}", *words)
    wait_until(lambda: parts(out) >= 2)
    (token,) = out.glob("submitted/0001/*.token")
    assert token.stat().st_mode & 0o777 == 0o600
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    assert slurm.wait(job, 300) == "COMPLETED", slurm.logs(out)
    assert slurm.field(job, "Restarts") == "1"
    assert "queued again: exit code 130" in slurm.log(out, job)
    assert not list(out.glob("submitted/0001/*.token"))
    assert {name: found for name, found in hashes(out).items() if not name.startswith("submitted/")} == reference
    left = [p.info["cmdline"] for p in psutil.process_iter(["cmdline"]) if str(slurm.folder) in str(p.info["cmdline"])]
    assert not [line for line in left if "ray" in str(line)]
