"""Where the time of a training run went, over all its starts.

    python -m tools.goodput RUN

Read from attempts/*.json and metrics.jsonl: every second from the first start to the last sign of life is one of

    steps        steps that stand in the run, with their validation, logging and waiting for data
    replay       steps that were taken and lost, as no checkpoint held them: they were taken again
    checkpoint   training stood still for a save, the one at the end of a start included
    detect       from the last line of a start that died, or lost a rank, until it said so, or until the next start
    restart      from the start of rank 0's process to its first step
    idle         from a start's said end to the next start's process: a queue, a launcher, nobody

Goodput is steps / wall time, the effective training time ratio (ETTR) of arXiv 2410.21680: productive over available
wall time, where what is lost to a failure, replay and restart are not productive.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import mean, median
from typing import Any

from sm_train import config
from sm_train.errors import UserError, run_command
from sm_train.runlog import METRICS
from sm_train.train import attempts

USAGE = "usage: python -m tools.goodput RUN"
KINDS = ("steps", "replay", "checkpoint", "detect", "restart", "idle")
_SAVED = ("complete", "SIG", "a signal")
"""How the ends begin at which nothing is lost."""
Json = dict[str, Any]


@dataclass
class Account:
    """Seconds by kind: a partition of the time from ``begun_s`` to ``now_s``."""

    begun_s: float
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    starts: int = 0
    losses: int = 0
    """Starts that ended without having saved."""
    lost_steps: int = 0
    now_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.now_s = self.begun_s

    def spend(self, kind: str, until_s: float) -> None:
        """All time up to a moment was of one kind; nothing where clocks of hosts disagree."""
        self.seconds[kind] += max(until_s - self.now_s, 0.0)
        self.now_s = max(until_s, self.now_s)

    @property
    def wall_s(self) -> float:
        return self.now_s - self.begun_s

    @property
    def goodput(self) -> float:
        """The share of the wall time that made steps which stand."""
        return self.seconds["steps"] / self.wall_s if self.wall_s else 0.0

    def share(self, kind: str) -> float:
        return self.seconds[kind] / self.wall_s if self.wall_s else 0.0


def ceiling(stall_s: float, interval_s: float, between_s: float, restart_s: float) -> float:
    """The goodput that saves and losses allow: 1 - d/I - I/(2M) - R/M (Young 1974, first order).

    Args:
        stall_s: d, how long a save holds training up.
        interval_s: I, training between two saves.
        between_s: M, mean time between losses.
        restart_s: R, from a loss until training goes on.
    """
    return 1 - stall_s / interval_s - interval_s / (2 * between_s) - restart_s / between_s


def best_interval(stall_s: float, between_s: float) -> float:
    """The time between saves that costs least, sqrt(2 d M), in seconds (Young 1974)."""
    return math.sqrt(2 * stall_s * between_s)


def account(starts: Sequence[Json], lines: Sequence[Json]) -> Account:
    """Divide a run's time.

    Args:
        starts: what attempts/*.json say, in order.
        lines: of metrics.jsonl.
    """
    usual_s = median(step_seconds(lines) or [0.0])
    found = Account(_time_s(starts[0]["started"]))
    gap = "idle"
    for number, start in enumerate(starts):
        found.starts += 1
        found.spend(gap, _time_s(start["started"]))
        kept = [line for line in lines if line["attempt"] == start["attempt"]]
        found.spend("restart", kept[0]["time_s"] - usual_s if kept else _time_s(start["began"]))
        for line in kept:
            found.spend("checkpoint", min(found.now_s + line.get("checkpoint_s", 0.0), line["time_s"]))
            found.spend("steps", line["time_s"])
        reached = starts[number + 1].get("found", {}) if number + 1 < len(starts) else {}
        if reached.get("attempt") == start["attempt"]:
            found.lost_steps += reached["step"] - (kept[-1]["step"] if kept else start["from_step"])
            found.spend("replay", reached["time_s"])
        is_saved = start.get("how", "").startswith(_SAVED)
        found.losses += not is_saved and number + 1 < len(starts)
        if "ended" in start:
            # One that was fenced off may end behind the next one's start, whose time it is then.
            later = [_time_s(other["started"]) for other in starts[number + 1 : number + 2]]
            found.spend("checkpoint" if is_saved else "detect", min([_time_s(start["ended"]), *later]))
        gap = "idle" if "ended" in start else "detect"
    return found


def step_seconds(lines: Sequence[Json]) -> list[float]:
    """Wall seconds of each step but the first of a start, without the save before it."""
    pairs = itertools.pairwise(lines)
    return [b["time_s"] - a["time_s"] - b.get("checkpoint_s", 0.0) for a, b in pairs if a["attempt"] == b["attempt"]]


def read(run: Path) -> tuple[list[Json], list[Json]]:
    """A run's starts and the lines of its metrics.

    Raises:
        UserError: it has none, or is of a version that did not write down when.
    """
    starts = [attempts.read(run, number) for number in range(1, attempts.current(run) + 1)]
    starts = [start for start in starts if start]  # one that was killed as it began has said nothing
    path = run / METRICS
    if not starts or not path.is_file():
        raise UserError(f"run folder {run} has no attempts or no {METRICS}; {USAGE}")
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:  # the last line of a run that was killed
            continue
    if any("started" not in start for start in starts) or any("time_s" not in line for line in lines):
        raise UserError(
            f"run folder {run} was begun by a version that did not note the time of each step; start another"
        )
    return starts, lines


def _time_s(said: str) -> float:
    return datetime.fromisoformat(said).timestamp()


def advice(found: Account, lines: Sequence[Json], save_every: int) -> str:
    """What the run's saves and losses allow, and the save interval that would have been best."""
    stalls = [line["checkpoint_s"] for line in lines if "checkpoint_s" in line]
    steps = step_seconds(lines)
    if not (found.losses and stalls and steps):
        return "no loss to reckon with: loop.save_every decides how much the next one costs"
    stall_s, step_s, between_s = mean(stalls), median(steps), found.wall_s / found.losses
    restart_s = sum(found.seconds[kind] for kind in ("detect", "restart", "idle")) / found.starts
    best_s = best_interval(stall_s, between_s)
    return (
        f"a loss each {between_s:.0f} s (M), {restart_s:.1f} s to go on (R), {stall_s:.3f} s a save (d), one each "
        f"{save_every * step_s:.1f} s (I): 1 - d/I - I/2M - R/M allows "
        f"{ceiling(stall_s, save_every * step_s, between_s, restart_s):.3f}; the best I, sqrt(2dM), is {best_s:.1f} s: "
        f"loop.save_every={max(round(best_s / step_s), 1)}"
    )


def main(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        return print(__doc__)
    if len(argv) != 1:
        raise UserError(USAGE)
    run = Path(argv[0])
    starts, lines = read(run)
    found = account(starts, lines)
    last = lines[-1]["step"] if lines else 0
    print(f"{run}: {last} steps, {found.starts} starts, {found.losses} of them lost, with {found.lost_steps} steps\n")
    print("\n".join(f"{kind:10} {found.seconds[kind]:12.1f} s {found.share(kind):7.1%}" for kind in KINDS))
    print(f"{'wall time':10} {found.wall_s:12.1f} s\n\ngoodput (ETTR) {found.goodput:.3f}")
    at_work_s = found.wall_s - found.seconds["idle"]
    if at_work_s:
        print(f"without idle   {found.seconds['steps'] / at_work_s:.3f}")
    print(advice(found, lines, int(config.read_yaml(run / "config.yaml")["loop"]["save_every"])))


if __name__ == "__main__":
    run_command(main)
