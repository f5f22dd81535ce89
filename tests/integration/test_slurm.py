"""A real SLURM of two nodes runs what is submitted to it: a job array, a training that its time limit interrupts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from cluster import submit
from sm_train import files
from sm_train.errors import UserError
from sm_train.precompute import PrecomputeConfig
from tests import training
from tests.builders import ROOT, child_env
from tests.integration.precompute_jobs import command_file, hashes
from tests.slurm.scheduler import Scheduler, slurm

__all__ = ["slurm"]

pytestmark = pytest.mark.slow
LOOP = {"steps": 12, "save_every": 5, "validate_every": 4, "log_every": 1}
AT_STEP = 7


@pytest.fixture(scope="module")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training.shard_set(tmp_path_factory.mktemp("slurm") / "shards")


@pytest.fixture(scope="module")
def trained(slurm: Scheduler, shard_folder: Path) -> tuple[Path, str]:
    """A training of a rank on each node and its job; in its step 7 the ranks wait for the signal."""
    path = training.write_config(shard_folder.parent / "run.yaml", shard_folder, loop=LOOP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_PAUSE", f"{AT_STEP}:{shard_folder.parent / 'signalled'}")
        words = ["nodes=2", "slurm.time=1", "slurm.signal_s=59"]  # SLURM looks at its limits twice a minute
        (job,) = slurm.submit("pretrain", str(path), *words)
    return path.with_suffix(""), job


def test_precompute_over_a_job_array_makes_the_same_bytes(
    slurm: Scheduler, trained: object, cfg: PrecomputeConfig, reference: dict[str, str], tmp_path: Path
) -> None:
    """Beside the training, which waits for most of its minute."""
    out = tmp_path / "set"
    words = [str(command_file(cfg, tmp_path)), f"out={out}", "slurm.tasks=2", "slurm.cpus=1", "slurm.time=30"]
    array, joining = slurm.submit("precompute", *words)
    assert slurm.wait(joining) == "COMPLETED", slurm.logs(out)
    beside = ("submitted/", "log-")  # what was submitted; measurements of each task
    assert {name: found for name, found in hashes(out).items() if not name.startswith(beside)} == reference
    said = [slurm.log(out, f"{array}_{task}") for task in (0, 1)]
    assert all(said), "a task of the array did nothing"
    assert "15 of 15 parts are there already" in slurm.log(out, joining)


def test_a_run_that_its_time_limit_interrupts_goes_on_bit_equal(
    slurm: Scheduler, trained: tuple[Path, str], shard_folder: Path, tmp_path: Path
) -> None:
    run, job = trained
    assert slurm.wait(job) == "COMPLETED", slurm.logs(run)
    assert slurm.field(job, "Restarts") != "0"
    attempts = [files.read_json(path) for path in sorted((run / "attempts").glob("*.json"))]
    assert [(a["ranks"], a["how"]) for a in attempts] == [(2, "SIGUSR1"), (2, "complete")]
    assert AT_STEP <= attempts[0]["at_step"] == attempts[1]["from_step"] < LOOP["steps"]
    said = slurm.log(run, job)
    assert said.index("queued again: exit code 75") < said.index(f"step {LOOP['steps']}/{LOOP['steps']}")

    undisturbed = training.write_config(tmp_path / "whole.yaml", shard_folder, loop=LOOP)
    assert training.in_ranks(2, lambda: training.train(undisturbed)) == [0, 0]
    training.assert_equal(*(training.tensors_of(r / "checkpoints/latest") for r in (run, tmp_path / "whole")))
    assert training.losses(run) == training.losses(tmp_path / "whole")


def test_a_mistake_is_not_queued_again_and_what_waits_for_it_ends(
    slurm: Scheduler, shard_folder: Path, tmp_path: Path
) -> None:
    path = training.write_config(tmp_path / "run.yaml", shard_folder, loop=LOOP)
    (job,) = slurm.submit("pretrain", str(path), "target=nothing", "nodes=2", "slurm.time=30")
    (second,) = slurm.submit("pretrain", str(path), "slurm.time=30", f"after={job}")
    assert slurm.state(second) == "PENDING"
    assert slurm.wait(job) == "FAILED"
    assert slurm.field(job, "Restarts") == "0"
    said = slurm.log(tmp_path / "run", job)
    assert "has no complete target set 'nothing'" in said
    assert "not queued again: exit code 2 is not mended by another start" in said
    assert slurm.wait(second) == "CANCELLED"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["slurm.partition=gpu"], "slurm.partition is 'gpu'; this cluster has main, short"),
        (["nodes=4"], "nodes is 4; a job in partition main gets at most 2"),
        (["nodes=2", "slurm.partition=short"], "nodes is 2; a job in partition short gets at most 1"),
        (["slurm.cpus=3"], "3 CPUs and 0 GPUs on each of 1 nodes: partition main has 0 such nodes; its largest has 2"),
        (["gpus_per_node=4", "ranks_per_node=4", "engine.device=auto"], "its largest has 2 CPUs and 2 GPUs"),
        (["slurm.time=2:00:00"], "slurm.time is 2:00:00; partition main allows at most 1:00:00"),
        (["slurm.constraint=fast"], "sbatch: Invalid feature specification"),
        (["slurm.nodelist=n7"], "sbatch: Invalid node name specified"),
    ],
)
def test_what_slurm_does_not_have_is_refused_before_anything_is_sent(
    slurm: Scheduler, shard_folder: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    path = training.write_config(tmp_path / "run.yaml", shard_folder)
    with pytest.raises(UserError) as caught:
        submit.main(["pretrain", str(path), "to=slurm", *words])
    assert said in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_what_slurm_has_is_let_through_and_a_dry_run_leaves_nothing(
    slurm: Scheduler, shard_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = training.write_config(tmp_path / "run.yaml", shard_folder, engine={"device": "auto"})
    words = ["gpus_per_node=2", "ranks_per_node=2", "nodes=2", "slurm.time=1:00:00"]
    submit.main(["pretrain", str(path), "to=slurm", "dry_run=true", *words])
    assert "#SBATCH --gpus-per-node=2" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["run.yaml"]


def test_a_node_that_is_out_of_service_is_waited_for(
    slurm: Scheduler, shard_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = training.write_config(tmp_path / "run.yaml", shard_folder)
    slurm.run("scontrol", "update", "nodename=n2", "state=drain", "reason=test")
    try:
        submit.main(["pretrain", str(path), "to=slurm", "nodes=2", "dry_run=true"])
    finally:
        slurm.run("scontrol", "update", "nodename=n2", "state=resume")
    said = capsys.readouterr().err
    assert said.startswith("warning: sbatch: Requested node configuration is not available; it waits for nodes")


def test_a_scheduler_beside_it_ends_with_the_process_that_started_it(slurm: Scheduler) -> None:
    argv = [sys.executable, "-m", "tests.slurm.scheduler"]
    with subprocess.Popen(argv, cwd=ROOT, env=child_env(), stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        conf = Path(starter.stdout.readline().strip().removeprefix("export SLURM_CONF="))
        folder = conf.parent
        try:
            assert {"munged", "slurmctld", "slurmd"} <= {name for _, name in processes_in(folder)}
        finally:
            starter.kill()
    training.wait_for(lambda: not processes_in(folder), 10)
    shutil.rmtree(folder)
    assert slurm.state_of_nodes() == ["idle", "idle"]


def processes_in(folder: Path) -> set[tuple[int, str]]:
    """The processes whose working folder it is, or that name it."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.cwd() == str(folder) or str(folder) in " ".join(process.cmdline()):
                found.add((process.pid, process.name()))
    return found
