"""The drill: a quarter of an hour of training under a supervisor, with a kill -9 of a random rank each three minutes.

    make chaos                                                         # or pytest -m chaos -s tests/chaos/test_drill.py
    DRILL_SECONDS=120 DRILL_KILL_S=30 pytest -m chaos -s tests/chaos/test_drill.py                      # to try it out

Two ranks train a mapper of the miniature's shapes with plain torch. The supervisor starts the same command again when
all ranks have ended, as a scheduler's requeue or Ray Train does. The run must come within 0.95 of the goodput that its
own restarts and saves allow to first order (Young 1974; Daly 2006):

    1 - d/I - I/(2M) - R/M      best where I = sqrt(2 d M)

d: how long a save holds training up, measured in the drill; I: the time between saves, chosen by that rule from a short
run before; M: the time between kills; R: from a kill to the end of the first new step, measured in the drill.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

import pytest

from sm_train import files
from sm_train.errors import LOST, STOPPED
from tests import training
from tests.builders import ROOT, child_env
from tools import goodput
from tools.bench import resume

pytestmark = pytest.mark.chaos
DRILL_S = float(os.environ.get("DRILL_SECONDS", "900"))
KILL_S = float(os.environ.get("DRILL_KILL_S", "180"))
RANKS = 2
SHARE = 0.95
_LATE_S = 300.0


@dataclass
class Drill:
    """What the supervisor saw; seconds since the epoch."""

    killed_s: list[float] = field(default_factory=list)
    victims: list[int] = field(default_factory=list)
    noticed_s: list[float] = field(default_factory=list)
    """When all ranks had ended, and the command was started again."""


def start(path: Path, log: Path) -> list[subprocess.Popen[bytes]]:
    """The ranks of one start."""
    port = str(training.free_port())
    begun = []
    for rank in range(RANKS):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        command = [sys.executable, "-m", "sm_train.pretrain", str(path)]
        with log.open("ab") as out:
            begun.append(subprocess.Popen(command, cwd=ROOT, env=child_env(**place), stdout=out, stderr=out))
    return begun


def supervise(path: Path, log: Path, seconds: float, kill_s: float) -> Drill:
    """Keep a run at work, kill a rank once in a while, and ask it to save and leave at the end."""
    drill, draw = Drill(), random.Random(0)
    begun_s, next_kill_s, is_over = time.time(), kill_s, False
    ranks = start(path, log)
    try:
        while True:
            time.sleep(0.01)
            passed_s = time.time() - begun_s
            assert passed_s < seconds + _LATE_S, f"the run does not end\n{log.read_text()[-3000:]}"
            if passed_s >= seconds and not is_over:
                is_over = True
                for rank in ranks:
                    rank.send_signal(signal.SIGTERM)
            elif passed_s >= next_kill_s <= seconds - kill_s:  # each kill has its time
                next_kill_s += kill_s
                drill.victims.append(draw.randrange(RANKS))
                drill.killed_s.append(time.time())
                ranks[drill.victims[-1]].kill()
            codes = [rank.poll() for rank in ranks]
            if None in codes:
                continue
            if is_over:
                assert codes == [STOPPED] * RANKS, f"{codes}\n{log.read_text()[-3000:]}"
                return drill
            victim = drill.victims[-1] if drill.victims else None
            expected = [-signal.SIGKILL if rank == victim else LOST for rank in range(RANKS)]
            assert codes == expected, f"{codes}\n{log.read_text()[-3000:]}"
            drill.noticed_s.append(time.time())
            ranks = start(path, log)
    finally:
        end(ranks)


def end(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Let nothing live on."""
    for rank in ranks:
        rank.kill()
        rank.wait()


def calibrate(folder: Path, shard_set: Path) -> tuple[float, float]:
    """Seconds of a save's stall and of a step, medians of a short run with no kill."""
    loop = {"steps": 60, "save_every": 6, "validate_every": 0, "log_every": 1000}
    path = resume.write_config(folder / "calibration.yaml", resume.MINIATURE, shard_set, **loop)
    log = folder / "calibration.log"
    ranks = start(path, log)
    try:
        assert [rank.wait(_LATE_S) for rank in ranks] == [0] * RANKS, log.read_text()[-3000:]
    finally:
        end(ranks)
    lines = training.metrics(path.with_suffix(""))
    return median(row["checkpoint_s"] for row in lines if "checkpoint_s" in row), median(goodput.step_seconds(lines))


def test_training_that_is_killed_each_three_minutes_comes_near_what_its_restarts_allow(tmp_path: Path) -> None:
    shard_set = resume.make_set(tmp_path / "set", 6_000, 144, 128)
    stall_s, step_s = calibrate(tmp_path, shard_set)
    save_every = max(round(goodput.best_interval(stall_s, KILL_S) / step_s), 1)
    loop = {"steps": 10**6, "save_every": save_every, "validate_every": 0, "log_every": 100}
    path = resume.write_config(tmp_path / "run.yaml", resume.MINIATURE, shard_set, **loop)
    drill = supervise(path, tmp_path / "drill.log", DRILL_S, KILL_S)

    run = path.with_suffix("")
    starts, lines = goodput.read(run)
    assert [row["step"] for row in lines] == list(range(1, len(lines) + 1))
    assert files.read_json(run / f"attempts/{len(starts)}.json")["how"] == "SIGTERM"
    assert len(starts) == len(drill.killed_s) + 1 == len(drill.noticed_s) + 1
    found = goodput.account(starts, lines)
    detect_s = [noticed - killed for killed, noticed in zip(drill.killed_s, drill.noticed_s, strict=True)]
    first_s = [next(row["time_s"] for row in lines if row["attempt"] == said["attempt"]) for said in starts[1:]]
    restart_s = [first - killed for killed, first in zip(drill.killed_s, first_s, strict=True)]
    stall_s, now_s = (
        mean(row["checkpoint_s"] for row in lines if "checkpoint_s" in row),
        median(goodput.step_seconds(lines)),
    )
    interval_s = save_every * now_s
    ceiling = goodput.ceiling(stall_s, interval_s, KILL_S, mean(restart_s))
    report = [
        f"{found.wall_s:.0f} s, {len(lines)} steps of {now_s:.3f} s ({step_s:.3f} s before), a save each {save_every}; "
        f"{len(restart_s)} kills, of ranks {drill.victims}; {found.lost_steps} steps taken again",
        f"M {KILL_S:.0f} s, d {stall_s:.3f} s, I {interval_s:.2f} s, R {mean(restart_s):.2f} s "
        f"({min(restart_s):.2f} to {max(restart_s):.2f}), of it until all ranks had ended {mean(detect_s):.2f} s",
        *(f"{kind:10} {found.seconds[kind]:8.2f} s {found.share(kind):7.2%}" for kind in goodput.KINDS),
        f"goodput {found.goodput:.4f}, ceiling {ceiling:.4f}: {found.goodput / ceiling:.3f} of it",
    ]
    print("\n" + "\n".join(report))
    assert found.goodput >= SHARE * ceiling, "\n".join(report)
