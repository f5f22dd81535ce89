"""Ranks that die, stop, hang or fail: the others leave by themselves, with code 76 and a line that names the culprit.

Every rank here is a real process of a real run; what goes wrong goes wrong in the middle of a step.
"""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sm_train.errors import LOST, UserError, run_command
from sm_train.train import loop, start
from sm_train.train.engines.local import LocalEngine
from sm_train.train.engines.watch import Watch
from tests import training

pytestmark = pytest.mark.slow
ENGINE = {"heartbeat_s": 2, "timeout_s": 60}
LEAVES = r"error: (?P<why>.*); rank (?P<rank>\d) leaves at mark \d+ \(\w+\), in \S+:\d+ \S+; the same command goes on"


@pytest.fixture(scope="module")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    importlib.import_module("torch.utils.tensorboard")  # once, before the forks

    return training.shard_set(tmp_path_factory.mktemp("watch") / "shards")


@pytest.fixture
def ranks(
    shard_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[list[int], str]]:
    """Runs ranks of which one misbehaves in step 4; their exit codes, and all that they wrote to stderr."""

    def run(world_size: int, culprit: int, misbehave: Callable[[], object], **engine: Any) -> tuple[list[int], str]:
        path = training.write_config(tmp_path / "run.yaml", shard_folder, engine={**ENGINE, **engine})
        if engine.get("name") == "deepspeed":
            importlib.import_module("deepspeed")

        def work() -> None:
            (tmp_path / f"rank-{os.environ['RANK']}").write_text(str(os.getpid()))
            if int(os.environ["RANK"]) == culprit:
                in_step(4, misbehave)
            training.train(path)

        codes = training.in_ranks(world_size, work, timeout_s=40)
        pids = {rank: (tmp_path / f"rank-{rank}").read_text() for rank in range(world_size)}
        stderr = capfd.readouterr().err
        for rank, pid in pids.items():
            stderr = stderr.replace(f"pid {pid})", f"pid of {rank})")
        return codes, stderr

    return run


def in_step(step: int, misbehave: Callable[[], object]) -> None:
    """Let this process do something in the middle of a step, between its gradients and its update."""
    real = loop.learning_rate

    def wrapper(cfg: Any, number: int, steps: int) -> float:
        if number == step:
            misbehave()
        return real(cfg, number, steps)

    loop.learning_rate = wrapper


def verdicts(stderr: str) -> dict[int, str]:
    """By rank, why it left; each rank has written one line."""
    lines = [re.match(LEAVES, line) for line in stderr.splitlines() if line.startswith("error: ")]
    found = {int(line["rank"]): line["why"] for line in lines if line}
    assert len(found) == len(lines)
    return found


def signal_self(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("world_size", "culprit", "engine"),
    [(2, 1, {}), (2, 0, {}), (4, 2, {}), (2, 1, {"name": "deepspeed", "zero_stage": 1})],
    ids=["rank-1-of-2", "rank-0-of-2", "rank-2-of-4", "zero-1"],
)
def test_a_rank_that_is_killed_is_named_by_all_others(
    ranks: Any, world_size: int, culprit: int, engine: dict[str, Any]
) -> None:
    codes, stderr = ranks(world_size, culprit, signal_self(signal.SIGKILL), **engine)
    assert codes == [-signal.SIGKILL if rank == culprit else LOST for rank in range(world_size)]
    why = verdicts(stderr)
    assert sorted(why) == [rank for rank in range(world_size) if rank != culprit]
    for line in why.values():
        assert re.fullmatch(
            rf"rank {culprit} \(host \S+, pid of {culprit}\) is gone: its process ended without a word", line
        )
    assert "Traceback" not in stderr


@pytest.mark.parametrize("engine", [{}, {"name": "deepspeed", "zero_stage": 1}], ids=["local", "zero-1"])
@pytest.mark.parametrize(
    "place", [(start, "require_one_start"), (Watch, "start")], ids=["as-ranks-met", "before-watch"]
)
def test_a_rank_that_dies_before_the_watch_begins_is_lost_too(
    ranks: Any, monkeypatch: pytest.MonkeyPatch, engine: dict[str, Any], place: tuple[Any, str]
) -> None:
    real = getattr(*place)

    def die(*args: Any) -> None:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        real(*args)

    def command(*args: Any) -> None:
        run_command(lambda argv: real_train(*args))

    real_train = training.train
    monkeypatch.setattr(*place, die)
    monkeypatch.setattr(training, "train", command)
    codes, stderr = ranks(2, -1, lambda: None, **engine)
    assert codes == [LOST, -signal.SIGKILL], stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: rank 0 on ")
    assert "does not find the others at 127.0.0.1" in line
    assert "Traceback" not in stderr


def test_a_rank_that_does_not_die_of_sigterm_leaves_all_the_same(
    ranks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under torchrun, which ends the other ranks with SIGTERM, where that only asks for a stop after the step."""
    signals: list[int] = []

    def begin() -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))

    def die() -> None:
        os.kill(int((tmp_path / "rank-0").read_text()), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGKILL)

    real = LocalEngine.prepare
    monkeypatch.setattr(LocalEngine, "prepare", lambda *args: (begin(), real(*args)))
    codes, stderr = ranks(2, 1, die)
    assert codes == [LOST, -signal.SIGKILL]
    assert sorted(verdicts(stderr)) == [0]


@pytest.mark.parametrize("culprit", [1, 0])
def test_a_rank_that_is_stopped_is_named_by_the_other(ranks: Any, tmp_path: Path, culprit: int) -> None:
    def stop() -> None:
        other = (tmp_path / f"rank-{1 - culprit}").read_text()
        at_work = f"grep -qs 'State:.[^Z]' /proc/{other}/status"
        subprocess.Popen(["sh", "-c", f"while {at_work}; do sleep 0.1; done; kill -9 {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)

    codes, stderr = ranks(2, culprit, stop)
    assert codes[1 - culprit] == LOST
    assert codes[culprit] == -signal.SIGKILL
    (line,) = verdicts(stderr).values()
    assert re.fullmatch(rf"rank {culprit} \(host \S+, pid of {culprit}\) has not been heard from for 2 s", line)


def test_a_rank_that_hangs_is_named_by_its_marks_and_leaves_too(ranks: Any) -> None:
    codes, stderr = ranks(2, 1, lambda: time.sleep(100), timeout_s=3)
    assert codes == [LOST, LOST]
    why = verdicts(stderr)
    assert why[0] == why[1]
    found = re.fullmatch(
        r"rank 1 \(host \S+, pid of 1\) hangs: at mark (\d+) \(sum_over_ranks\) for [34] s, "
        r"while others wait at mark (\d+) \(\w+\)",
        why[0],
    )
    assert found
    assert int(found[1]) < int(found[2])
    assert "in test_watch.py" in stderr  # where rank 1 sleeps


def test_ranks_that_all_hang_say_so(ranks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "learning_rate", lambda cfg, number, steps: time.sleep(100))
    codes, stderr = ranks(2, -1, lambda: None, timeout_s=2)
    assert codes == [LOST, LOST]
    for line in verdicts(stderr).values():
        assert re.fullmatch(r"all ranks hang: none has gone on from mark \d+ \(sum_over_ranks\) for 2 s", line)


@pytest.mark.parametrize(("world_size", "culprit"), [(4, 1), (2, 0)])
def test_a_rank_that_fails_keeps_its_traceback_and_is_named_by_the_others(
    ranks: Any, world_size: int, culprit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = LocalEngine.forward, []

    def forward(self: LocalEngine, batch: Any) -> Any:
        calls.append(batch)
        if self.rank == culprit and len(calls) == 6:
            raise ValueError("a bug\nof ours")
        return real(self, batch)

    monkeypatch.setattr(LocalEngine, "forward", forward)
    codes, stderr = ranks(world_size, -1, lambda: None, heartbeat_s=30)  # so that silence is not what ends them
    assert codes == [1 if rank == culprit else LOST for rank in range(world_size)]
    assert stderr.count("Traceback") == 1
    assert "ValueError: a bug\nof ours" in stderr
    why = verdicts(stderr)
    assert len(why) == world_size - 1
    for line in why.values():
        assert re.fullmatch(rf"rank {culprit} \(host \S+, pid of {culprit}\) left: ValueError: a bug of ours", line)


def test_a_mistake_that_all_ranks_meet_is_told_by_each(ranks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(cfg: Any, number: int, steps: int) -> float:
        time.sleep(0.7 * int(os.environ["RANK"]))  # one is late
        raise UserError("the gradient is not finite")

    monkeypatch.setattr(loop, "learning_rate", mistaken)
    codes, stderr = ranks(2, -1, lambda: None)
    assert codes == [1, 1]  # the frame of these ranks shows a traceback; a command ends with 2 and one line
    assert stderr.count("UserError: the gradient is not finite") == 2
    assert not verdicts(stderr)


def test_a_collective_that_fails_on_its_own_keeps_its_traceback(ranks: Any) -> None:
    import torch.distributed as dist

    codes, stderr = ranks(2, 1, lambda: dist.all_reduce(torch.ones(3, dtype=torch.complex64), op=dist.ReduceOp.MAX))
    assert codes == [LOST, 1]
    assert stderr.count("Traceback") == 1
    (line,) = verdicts(stderr).values()
    assert re.fullmatch(r"rank 1 \(host \S+, pid of 1\) left: \w+: .*", line)


@pytest.mark.parametrize(("world_size", "late"), [(2, 1), (4, 0)])
def test_an_undisturbed_run_says_nothing_of_it(
    ranks: Any, world_size: int, late: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Watch.close

    def close(self: Watch) -> None:
        time.sleep(2.5 if self.rank == late else 0)  # after the last meeting, and longer than a heartbeat
        real(self)

    monkeypatch.setattr(Watch, "close", close)
    codes, stderr = ranks(world_size, -1, lambda: None)
    assert codes == [0] * world_size
    assert stderr == ""


def test_slow_validation_and_slow_saving_are_no_hang(ranks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sm_train.train import checkpoint
    from sm_train.train.validate import _Batches

    save, of_rank, begin = checkpoint.save, _Batches.of_rank, _Batches.__init__

    def slow_save(*args: Any, **kwargs: Any) -> None:
        time.sleep(2.2)  # longer than a heartbeat
        save(*args, **kwargs)

    def slow_batches(self: Any, engine: Any) -> Any:
        for batch in of_rank(self, engine):
            time.sleep(1.2)  # together longer than a rank may stand still
            yield batch

    monkeypatch.setattr(checkpoint, "save", slow_save)
    monkeypatch.setattr(_Batches, "of_rank", slow_batches)
    monkeypatch.setattr(_Batches, "__init__", lambda self, items, budget: begin(self, items, 64))  # 6 batches
    monkeypatch.setattr(loop.LoopConfig, "__post_init__", lambda self: object.__setattr__(self, "steps", 3))
    codes, stderr = ranks(2, -1, lambda: None, timeout_s=3)
    assert codes == [0, 0]
    assert stderr == ""
