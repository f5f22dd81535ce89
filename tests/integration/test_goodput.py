"""Where the time of a real run went that was killed and went on."""

from __future__ import annotations

import importlib
import time
from pathlib import Path

import pytest

from tests import training
from tools import goodput

pytestmark = pytest.mark.slow


def test_a_killed_run_s_time_is_divided_without_a_rest(tmp_path: Path) -> None:
    importlib.import_module("torch.utils.tensorboard")
    path = training.write_config(tmp_path / "run.yaml", training.shard_set(tmp_path / "shards"))
    run = path.with_suffix("")

    def until_killed() -> None:
        training.kill_at_step(9, run, saved=6)
        training.train(path)

    begun_s = time.time()
    assert training.in_ranks(1, until_killed) == [-9]
    pause_s = 1.5
    time.sleep(pause_s)
    assert training.in_ranks(1, lambda: training.train(path)) == [0]
    ended_s = time.time()

    starts, lines = goodput.read(run)
    found = goodput.account(starts, lines)
    assert (found.starts, found.losses, found.lost_steps) == (2, 1, 2)  # 7 and 8 had a line, and were taken again
    assert sum(found.seconds.values()) == pytest.approx(found.wall_s)
    # Nothing of the time was before or behind; the kernel tells a process's start in hundredths of a second.
    assert begun_s - 0.05 <= found.begun_s < found.now_s <= ended_s + 0.05
    for kind in ("steps", "replay", "restart", "checkpoint"):
        assert found.seconds[kind] > 0
    assert found.seconds["detect"] >= pause_s
    assert found.seconds["idle"] == 0
