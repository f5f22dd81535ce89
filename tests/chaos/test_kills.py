"""``make chaos``: 200 runs killed at random points, one to three times each, and gone on with.

``CHAOS_POINT=17 make chaos`` runs one of them.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import training, tuning
from tests.chaos import kills
from tests.chaos.kills import Outcome, Point

pytestmark = pytest.mark.chaos
POINTS = [
    *(kills.point(number, "local") for number in range(170)),
    *(kills.point(number, "zero-1", launcher=number % 5 == 0) for number in range(170, 185)),
    *(kills.point(number, "zero-3", launcher=number % 5 == 0) for number in range(185, 200)),
]
CHOSEN = [p for p in POINTS if os.environ.get("CHAOS_POINT", str(p.number)) == str(p.number)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, shard_set: Path) -> kills.Reference:
    kills.prepare(sorted({p.engine for p in CHOSEN}))
    folder = tmp_path_factory.mktemp("kills")
    words = training.shard_set(folder / "words")
    spoken = Path(shutil.copytree(shard_set, folder / "spoken"))
    world = tuning.world(folder, spoken)

    def make_config(engine: str, name: str) -> Path:
        path = folder / f"{name}.yaml"
        if engine == "zero-3":
            return tuning.write_config(path, world, spoken, loop=kills.LOOP, batch={"lanes": kills.LANES})
        return training.write_config(path, words, loop=kills.LOOP)

    return kills.Reference(make_config)


@pytest.fixture(scope="module")
def outcomes() -> Iterator[list[Outcome]]:
    """All outcomes; a table of them is printed at the end."""
    found: list[Outcome] = []
    begun_s = time.monotonic()
    yield found
    print(f"\n{table(found)}\n{len(found)} runs in {time.monotonic() - begun_s:.0f} s")


@pytest.mark.parametrize("point", CHOSEN, ids=lambda p: f"{p.number}-{p.engine}")
def test_a_run_killed_at_a_random_point_goes_on(
    point: Point, reference: kills.Reference, outcomes: list[Outcome]
) -> None:
    try:
        outcomes.append(kills.judge(kills.carry_out(point, reference), reference))
    except AssertionError as error:
        error.add_note(f"{point}\nalone: CHAOS_POINT={point.number} make chaos")
        raise


def table(outcomes: list[Outcome]) -> str:
    """The kills by engine, W, and which ranks died when."""
    rows: dict[tuple[str, int, str], list[tuple[Outcome, int]]] = defaultdict(list)
    for outcome in outcomes:
        for kill, killed, lost in zip(outcome.point.kills, outcome.killed, outcome.lost_steps, strict=True):
            if killed:
                rows[outcome.point.engine, kill.ranks, f"{kill.who}, {kill.when}"].append((outcome, lost))
    every = [row for found in rows.values() for row in found]
    lines = ["engine | W | who, when | kills | in runs bit-equal | in runs close | lost steps, mean and most"]
    for key, found in [*sorted(rows.items()), (("all", "", ""), every)]:
        equal, lost = sum(outcome.is_equal for outcome, _ in found), [steps for _, steps in found]
        counts = [len(found), equal, len(found) - equal, f"{sum(lost) / len(lost):.1f}, {max(lost)}"]
        lines.append(" | ".join(map(str, [*key, *counts])))
    late = sum(not killed for outcome in outcomes for killed in outcome.killed)
    equal, left = sum(o.is_equal for o in outcomes), sum(o.survivors for o in outcomes)
    return "\n".join([*lines, f"{equal} runs bit-equal, {len(outcomes) - equal} close; {left} ranks left with 76; "
                      f"{late} kills came after the run's end"])  # fmt: skip
