"""When a run stops because too much is quarantined."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sm_train import quarantine
from sm_train.data import shards, store
from sm_train.data.samples import FEATS
from sm_train.meter import Incident
from sm_train.quarantine import Tally, TooManyQuarantined
from sm_train.records import Quarantined, Receipt, Unit, Utterance


def unit(index: int, first: int, count: int = 10) -> Unit:
    ids = [f"u{first + i}" for i in range(count)]
    return Unit(index, tuple(Utterance(i, "", 0, 1, "", "", "", "") for i in ids))


def write(root: Path, unit: Unit, bad: dict[str, str]) -> Receipt:
    good = [u.id for u in unit.utterances if u.id not in bad]
    samples = [{"id": i, "feats": np.zeros((2, 3), np.float16)} for i in good]
    rows = [Quarantined(i, reason, f"{i} is {reason}") for i, reason in bad.items()]
    shards.write_part(root, unit.part, FEATS, samples, [{"id": i} for i in good], rows, {})
    return Receipt(unit.part, len(good), len(bad), 1, 1, 1, 1, tuple(bad.values()))


UNITS = [unit(i, 10 * i) for i in range(4)]


def test_the_run_stops_with_the_unit_that_makes_it_certain(tmp_path: Path) -> None:
    tally = Tally(store.at(tmp_path), [], UNITS, share=0.05)
    tally.add(write(tmp_path, UNITS[2], {"u21": "silent", "u22": "too_long"}))
    with pytest.raises(TooManyQuarantined) as stopped:
        tally.add(write(tmp_path, UNITS[0], {"u3": "silent"}))
    assert str(stopped.value).startswith(
        "3 of 40 utterances are quarantined (2 silent, 1 too_long), above max_quarantined_share 0.05; "
        "the first is 'u3': u3 is silent."
    )


def test_those_barred_count_before_their_unit_is_done_and_once_alone(tmp_path: Path) -> None:
    tally = Tally(store.at(tmp_path), [], UNITS, share=0.05)
    barred = [
        Incident("barred", "", UNITS[1].part, Quarantined(f"u{10 + i}", "crashes_encoder", "dies")) for i in range(3)
    ]
    tally.add(barred[0])
    tally.add(barred[1])
    tally.add(Incident("death"))
    tally.add(write(tmp_path, UNITS[1], {"u10": "crashes_encoder", "u11": "crashes_encoder"}))
    other = Incident("barred", "", UNITS[3].part, Quarantined("u30", "crashes_encoder", "dies"))
    with pytest.raises(TooManyQuarantined, match=r"3 of 40 .*3 crashes_encoder.* the first is 'u10'"):
        tally.add(other)


def test_what_is_there_already_counts_at_once(tmp_path: Path) -> None:
    write(tmp_path, UNITS[0], {"u1": "silent", "u2": "silent", "u3": "silent"})
    with pytest.raises(TooManyQuarantined, match=r"3 of 40"):
        Tally(store.at(tmp_path), UNITS[:1], UNITS[1:], share=0.05)
    Tally(store.at(tmp_path), UNITS[:1], UNITS[1:], share=0.075)


def test_those_that_have_another_chance_count_only_when_they_fail_again(tmp_path: Path) -> None:
    bad = {"u1": "silent", "u2": "silent", "u3": "silent"}
    write(tmp_path, UNITS[0], bad)
    again = Unit(4, UNITS[0].utterances[1:4])
    tally = Tally(store.at(tmp_path), UNITS[:1], [*UNITS[1:], again], share=0.05)
    tally.add(write(tmp_path, again, {"u1": "silent", "u2": "too_long"}))
    with pytest.raises(TooManyQuarantined, match=r"3 of 40 .*1 silent, 1 too_long, 1 too_short"):
        tally.add(write(tmp_path, UNITS[1], {"u15": "too_short"}))


def test_a_later_part_has_the_last_word(tmp_path: Path) -> None:
    write(tmp_path, UNITS[0], {"u1": "silent", "u2": "silent"})
    again = Unit(4, UNITS[0].utterances[1:3])
    write(tmp_path, again, {"u2": "truncated"})
    rows = quarantine.rows_of(store.at(tmp_path), [UNITS[0].part, again.part])
    assert {i: row["reason"] for i, row in rows.items()} == {"u2": "truncated"}
