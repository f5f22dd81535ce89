"""Bisection against units in which some utterances end the process."""

from __future__ import annotations

import math
import random

import pytest

from cluster.encoding.suspects import Inquiry, Outcome
from sm_train.errors import UserError
from sm_train.records import Quarantined, Unit, Utterance


def unit_of(count: int, seed: int = 0) -> Unit:
    rng = random.Random(seed)
    return Unit(4, tuple(Utterance(f"u{i}", f"{i}.flac", 0, rng.uniform(1, 20), "a", "", "", "") for i in range(count)))


def present(unit: Unit) -> set[str]:
    return {u.id for u in unit.utterances} - {row.id for row in unit.barred}


def settle(inquiry: Inquiry, killers: set[str], lose: float = 0.0, seed: int = 0) -> tuple[int, int]:
    """Answer every question until the unit has passed; how many steps and deaths that took."""
    rng, steps, deaths = random.Random(seed), 0, 0
    while inquiry.step:
        steps += 1
        outcome = Outcome.CRASHED if present(inquiry.step.unit) & killers else Outcome.PASSED
        outcome = Outcome.LOST if rng.random() < lose else outcome
        deaths += outcome is not Outcome.PASSED
        inquiry.report(outcome)
        assert steps < 5000
    return steps, deaths


def test_an_innocent_unit_is_encoded_at_once() -> None:
    inquiry = Inquiry(unit_of(256))
    assert inquiry.step
    assert not inquiry.step.is_probe
    assert settle(inquiry, set()) == (1, 0)
    assert inquiry.barred == []


@pytest.mark.parametrize("count", [1, 2, 3, 7, 256])
@pytest.mark.parametrize("killers", [1, 2, 5])
def test_the_killers_are_found_and_nobody_else_at_a_bounded_price(count: int, killers: int) -> None:
    for seed in range(10):
        unit = unit_of(count, seed)
        guilty = {u.id for u in random.Random(seed).sample(unit.utterances, min(killers, count))}
        inquiry = Inquiry(unit)
        steps, deaths = settle(inquiry, guilty)
        assert {row.id for row in inquiry.barred} == guilty
        assert {row.reason for row in inquiry.barred} == {"crashes_encoder"}
        levels = math.ceil(math.log2(count)) if count > 1 else 0
        assert steps <= 2 + len(guilty) * (2 * levels + 2)
        assert deaths <= 1 + len(guilty) * (levels + 2)


def test_lost_processes_are_nobodys_fault() -> None:
    for seed in range(50):
        inquiry = Inquiry(unit_of(20, seed))
        settle(inquiry, {"u3", "u11"}, lose=0.2, seed=seed)
        assert {row.id for row in inquiry.barred} == {"u3", "u11"}


def test_a_death_or_two_by_chance_bar_nobody() -> None:
    for chance in range(9):
        inquiry = Inquiry(unit_of(16))
        inquiry.report(Outcome.CRASHED)
        for step in range(200):
            if inquiry.step is None:
                break
            inquiry.report(Outcome.CRASHED if step == chance else Outcome.PASSED)
        assert inquiry.step is None
        assert inquiry.barred == []


def test_those_barred_before_stay_so_and_are_not_asked_about() -> None:
    before = Quarantined("u2", "crashes_encoder", "known")
    unit = Unit(0, unit_of(6).utterances, (before,))
    inquiry = Inquiry(unit)
    settle(inquiry, {"u2", "u4"})
    assert [row.id for row in inquiry.barred] == ["u4"]
    assert inquiry.unit.barred[0] is before


def test_findings_are_told_when_they_are_made() -> None:
    inquiry, told = Inquiry(unit_of(8)), []
    while inquiry.step:
        outcome = Outcome.CRASHED if "u5" in present(inquiry.step.unit) else Outcome.PASSED
        told += inquiry.report(outcome)
    assert [row.id for row in told] == ["u5"]


def test_probes_cover_whole_batches_of_like_length() -> None:
    inquiry = Inquiry(unit_of(8))
    inquiry.report(Outcome.CRASHED)
    assert inquiry.step
    assert inquiry.step.is_probe
    by_duration = sorted(inquiry.step.unit.utterances, key=lambda u: u.duration_s)
    assert present(inquiry.step.unit) == {u.id for u in by_duration[:4]}


def test_a_unit_that_dies_though_nobody_does_alone_is_given_up() -> None:
    def together(inquiry: Inquiry) -> None:
        for _ in range(1000):
            assert inquiry.step
            inquiry.report(Outcome.CRASHED if len(present(inquiry.step.unit)) > 5 else Outcome.PASSED)

    with pytest.raises(UserError, match=r"part-0000004 ended its encoder's process 8 times, but none"):
        together(Inquiry(unit_of(8)))
