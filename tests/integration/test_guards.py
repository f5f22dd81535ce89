"""What ends a run early: signals, a disk that is full, a newer attempt. Real processes, judged by what they leave."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sm_train import errors, files, pretrain
from sm_train.data.mds import file_digest
from sm_train.train import loop
from tests import training
from tests.builders import ROOT, child_env

pytestmark = pytest.mark.slow
STEPS = 12
LOOP = {"steps": STEPS, "save_every": 5, "validate_every": 4, "log_every": 1}


@pytest.fixture(scope="module")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training.shard_set(tmp_path_factory.mktemp("guards") / "shards")


@pytest.fixture(scope="module")
def undisturbed(shard_folder: Path) -> Path:
    path = training.write_config(shard_folder.parent / "whole.yaml", shard_folder, loop=LOOP)
    assert training.in_ranks(2, lambda: training.train(path)) == [0, 0]
    return path.with_suffix("")


def command(path: Path, *words: str) -> None:
    """The command as a process would run it, in this fork; it leaves by its exit code."""
    sys.argv = ["pretrain", str(path), *words]
    try:
        errors.run_command(pretrain.main)
    except SystemExit as left:
        errors.exit_hard(int(left.code or 0))


def signal_at_step(step: int, number: signal.Signals) -> None:
    """Let this process get a signal in the middle of a step."""
    real = loop.learning_rate

    def signalling(cfg: object, done: int, steps: int) -> float:
        if done + 1 == step:
            os.kill(os.getpid(), number)
        return real(cfg, done, steps)  # type: ignore[arg-type]

    loop.learning_rate = signalling  # type: ignore[assignment]


def assert_equal_end(run: Path, undisturbed: Path) -> None:
    latest = [training.tensors_of(folder / "checkpoints/latest") for folder in (run, undisturbed)]
    training.assert_equal(*latest)
    lines, expected = training.metrics(run), training.metrics(undisturbed)
    same = ("step", "loss", "grad_norm", "valid_wer")
    assert [[line.get(n) for n in same] for line in lines] == [[line.get(n) for n in same] for line in expected]
    for link in ("latest", "best"):
        assert os.readlink(run / "checkpoints" / link) == os.readlink(undisturbed / "checkpoints" / link)


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 2), (signal.SIGUSR1, 7)])
def test_a_signal_to_any_rank_saves_on_all_and_the_run_goes_on_bit_equal(
    undisturbed: Path, shard_folder: Path, tmp_path: Path, number: signal.Signals, step: int
) -> None:
    path = training.write_config(tmp_path / "run.yaml", shard_folder, loop=LOOP)

    def work() -> None:
        if os.environ["RANK"] == "1":
            signal_at_step(step, number)
        command(path)

    assert training.in_ranks(2, work) == [errors.STOPPED] * 2
    run = tmp_path / "run"
    assert os.readlink(run / "checkpoints/latest") == f"step-{step + 1}"  # the step after: all learn of it together
    said = files.read_json(run / "attempts/1.json")
    assert (said["at_step"], said["how"]) == (step + 1, "a signal to another rank")
    assert training.in_ranks(2, lambda: command(path)) == [0, 0]
    assert files.read_json(run / "attempts/2.json")["how"] == "complete"
    assert_equal_end(run, undisturbed)


def test_the_command_says_what_it_did_on_a_signal(shard_folder: Path, tmp_path: Path) -> None:
    path = training.write_config(tmp_path / "run.yaml", shard_folder, loop={**LOOP, "steps": 100_000})
    argv = [sys.executable, "-m", "sm_train.pretrain", str(path)]
    process = subprocess.Popen(
        argv, cwd=ROOT, env=child_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        training.wait_for(lambda: (tmp_path / "run/checkpoints/latest").exists() or process.poll() is not None)
        process.send_signal(signal.SIGUSR1)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == errors.STOPPED
    saved = os.readlink(tmp_path / "run/checkpoints/latest").removeprefix("step-")
    assert said == f"{tmp_path}/run: saved at step {saved} on SIGUSR1; the same command goes on\n"
    assert files.read_json(tmp_path / "run/attempts/1.json")["how"] == "SIGUSR1"


def test_torchrun_passes_a_signal_on_and_its_ranks_save(shard_folder: Path, tmp_path: Path) -> None:
    path = training.write_config(tmp_path / "run.yaml", shard_folder, loop={**LOOP, "steps": 100_000})
    argv = training.torchrun(2, "sm_train.pretrain", path)
    module = argv.index("-m", 2)
    argv[module:module] = ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"]  # as docs/training.md says
    said = (tmp_path / "said").open("w")
    process = subprocess.Popen(argv, cwd=ROOT, env=child_env(), stdout=said, stderr=said)
    try:
        training.wait_for(lambda: (tmp_path / "run/checkpoints/latest").exists() or process.poll() is not None)
        process.send_signal(signal.SIGUSR1)
        process.wait(60)
    finally:
        process.kill()
    assert files.read_json(tmp_path / "run/attempts/1.json")["how"] == "SIGUSR1", (tmp_path / "said").read_text()
    saved = int(os.readlink(tmp_path / "run/checkpoints/latest").removeprefix("step-"))
    assert len(training.metrics(tmp_path / "run")) == saved


@pytest.mark.parametrize("on_error", ["stop", "go_on"])
def test_a_file_that_cannot_grow_stops_all_ranks_or_lets_them_go_on(
    undisturbed: Path, shard_folder: Path, tmp_path: Path, on_error: str
) -> None:
    """The limit on a file's size is the kernel's own: every write beyond it fails, as on a full disk."""
    path = training.write_config(tmp_path / "run.yaml", shard_folder, loop={**LOOP, "save_error": on_error})
    run = tmp_path / "run"

    def work() -> None:
        if os.environ["RANK"] == "0":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            real = loop.learning_rate

            def limited(cfg: object, done: int, steps: int) -> float:
                if done + 1 == 7:
                    training.wait_for(lambda: os.readlink(run / "checkpoints/latest") == "step-5")
                    size = 60_000  # more than the log has, less than the moments
                    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
                return real(cfg, done, steps)  # type: ignore[arg-type]

            loop.learning_rate = limited  # type: ignore[assignment]
        sys.stdout = sys.stderr = (tmp_path / f"said-{os.environ['RANK']}").open("w")
        command(path)

    codes = training.in_ranks(2, work)
    said = (tmp_path / "said-0").read_text()
    assert "could not be written" in said, said
    assert "File too large" in said
    assert not list((run / "checkpoints").glob(".aside-*"))
    if on_error == "stop":
        assert codes == [2, 2]
        assert "error: rank 0 cannot write the run folder" in (tmp_path / "said-1").read_text()
    else:
        assert codes == [2, 2]  # the last checkpoint is not there either
        assert training.metrics(run)[-1]["step"] == STEPS
        assert "training goes on (loop.save_error=go_on)" in said
    assert os.readlink(run / "checkpoints/latest") == "step-5"
    assert training.in_ranks(2, lambda: command(path)) == [0, 0]
    assert_equal_end(run, undisturbed)


def test_an_attempt_that_is_overtaken_leaves_without_writing(shard_folder: Path, tmp_path: Path) -> None:
    """The old attempt is stopped in step 7; a new one finishes the run; the old one wakes up and finds it taken."""
    path = training.write_config(tmp_path / "run.yaml", shard_folder, loop=LOOP)
    run = tmp_path / "run"

    def contents() -> str:
        found = [p for p in sorted(run.rglob("*")) if p.is_file() and not {"tensorboard", "attempts"} & set(p.parts)]
        return "\n".join(f"{p} {file_digest(p)}" for p in found)

    def is_finished() -> bool:
        return (run / "attempts/2.json").exists() and "complete" in (run / "attempts/2.json").read_text()

    def old() -> None:
        real = loop.learning_rate

        def paused(cfg: object, done: int, steps: int) -> float:
            if done + 1 == 7:
                (tmp_path / "is-paused").touch()
                training.wait_for(is_finished)
                (tmp_path / "finished").write_text(contents())
            return real(cfg, done, steps)  # type: ignore[arg-type]

        loop.learning_rate = paused  # type: ignore[assignment]
        sys.stderr = (tmp_path / "said").open("w")
        command(path)

    def new() -> None:
        training.wait_for(lambda: (tmp_path / "is-paused").exists())
        command(path)

    def work() -> None:
        job = {"0": old, "1": new}[os.environ["RANK"]]
        os.environ.update(RANK="0", WORLD_SIZE="1")
        job()

    assert training.in_ranks(2, work) == [2, 0]
    assert "attempt 2 has begun since; attempt 1 leaves without writing" in (tmp_path / "said").read_text()
    assert contents() == (tmp_path / "finished").read_text()
    assert [line["attempt"] for line in training.metrics(run)] == [1] * 5 + [2] * 7
