"""A dozen of the runs of ``make chaos``, of every kind: killed ranks by step, save and time, and a resume."""

from __future__ import annotations

import pytest

from tests import training
from tests.chaos import kills

pytestmark = pytest.mark.slow
NUMBERS = [4, 7, 13, 22, 30, 37, 41, 45, 53, 58, 73, 161]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> kills.Reference:
    kills.prepare(["local"])
    folder = tmp_path_factory.mktemp("kills")
    words = training.shard_set(folder / "words")
    return kills.Reference(lambda engine, name: training.write_config(folder / f"{name}.yaml", words, loop=kills.LOOP))


def test_the_dozen_has_every_kind() -> None:
    points = [kills.point(number, "local") for number in NUMBERS]
    found = {(kill.who, kill.when) for point in points for kill in point.kills}
    assert found == {(who, when) for who in ("rank 0", "another", "all") for when in ("step", "save", "time")}
    assert {ranks for point in points for ranks in point.worlds} == {1, 2, 4}
    assert {len(set(point.worlds)) > 1 for point in points} == {True, False}
    assert max(len(point.kills) for point in points) == 3


@pytest.mark.parametrize("number", NUMBERS)
def test_a_run_killed_at_a_random_point_goes_on(number: int, reference: kills.Reference) -> None:
    point = kills.point(number, "local")
    outcome = kills.judge(kills.carry_out(point, reference), reference)
    assert outcome.is_equal == (len(set(point.worlds)) == 1)
