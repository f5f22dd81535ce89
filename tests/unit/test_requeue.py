"""Rounds of quarantined utterances: what they are made of, and when one begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from sm_train import requeue
from sm_train.data import store
from sm_train.errors import UserError
from sm_train.records import Unit
from tests.unit.test_quarantine import UNITS, write


@pytest.fixture
def failed(tmp_path: Path) -> Path:
    """A set of four units, one of them not done; six utterances are quarantined."""
    for i in (0, 1, 3):
        write(tmp_path, UNITS[i], {f"u{10 * i + 2}": "silent", f"u{10 * i + 7}": "silent"})
    return tmp_path


def names(units: list[Unit]) -> list[tuple[str, list[str]]]:
    return [(unit.part, [u.id for u in unit.utterances]) for unit in units]


ROUND_1 = [("part-0000004", ["u2", "u7", "u12", "u17"]), ("part-0000005", ["u32", "u37"])]


def test_a_round_holds_what_is_quarantined_in_order_behind_the_last_part(failed: Path) -> None:
    place = store.at(failed)
    assert requeue.with_rounds(place, UNITS, 4) == UNITS
    assert names(requeue.begin(place, UNITS, 4)) == ROUND_1
    assert names(requeue.with_rounds(place, UNITS, 4)[4:]) == ROUND_1


def test_a_round_under_way_is_not_begun_again(failed: Path) -> None:
    place = store.at(failed)
    requeue.begin(place, UNITS, 4)
    units = requeue.with_rounds(place, UNITS, 4)
    write(failed, units[4], {"u7": "silent"})
    assert requeue.begin(place, units, 4) == []
    assert names(requeue.with_rounds(place, UNITS, 4)[4:]) == ROUND_1


def test_the_next_round_holds_what_failed_again_but_not_what_still_waits(failed: Path) -> None:
    place = store.at(failed)
    requeue.begin(place, UNITS, 4)
    units = requeue.with_rounds(place, UNITS, 4)
    write(failed, units[4], {"u7": "silent", "u17": "too_long"})
    requeue.end(place)
    assert names(requeue.begin(place, units, 4)) == [("part-0000006", ["u7", "u17"])]
    assert len(requeue.with_rounds(place, UNITS, 4)) == 7


def test_nothing_quarantined_is_no_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert requeue.begin(store.at(tmp_path), UNITS, 4) == []
    assert "no quarantined utterance" in capsys.readouterr().out
    requeue.end(store.at(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_round_of_another_manifest_is_refused(failed: Path) -> None:
    place = store.at(failed)
    requeue.begin(place, UNITS, 4)
    with pytest.raises(UserError, match=r"requeue-0001.json starts at part-0000004, where this manifest's set is at"):
        requeue.with_rounds(place, UNITS[:3], 4)
