"""Rounds: utterances that were quarantined are run again once their audio is mended.

A round's utterances form new units behind the last part; no part is touched. ``requeue-0001.json`` says who they are
and is written before the first of them is encoded, so that a killed round is finished by whichever run comes next.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from sm_train import files, quarantine
from sm_train.data import manifest, shards
from sm_train.data.store import Store
from sm_train.errors import UserError
from sm_train.records import Quarantined, Unit, Utterance

_PREFIX, _SUFFIX = "requeue-", ".json"


@dataclass(frozen=True)
class _Round:
    name: str
    first_part: str
    rows: tuple[Quarantined, ...]
    """Who is run again, and what was said of each before."""
    is_over: bool
    """A run has come to its end since: the next round may begin."""


def with_rounds(place: Store, units: Sequence[Unit], unit_utterances: int) -> list[Unit]:
    """The manifest's units and those of all rounds so far.

    Utterances that a round took up are barred in the unit that had them before: should that part have to be made again,
    it becomes the same bytes, though the audio was mended since.

    Raises:
        UserError: a round does not fit the manifest.
    """
    by_id = {u.id: u for unit in units for u in unit.utterances}
    found = list(units)
    for one in _rounds(place):
        expected = Unit(len(found), ()).part
        if one.first_part != expected or not by_id.keys() >= {row.id for row in one.rows}:
            raise UserError(
                f"{place.uri}/{one.name} starts at {one.first_part}, where this manifest's set is at {expected}, or "
                "names utterances that the manifest lacks; give the manifest of the set, or another out folder"
            )
        last = {u.id: unit.index for unit in found for u in unit.utterances}
        for row in one.rows:
            before = found[last[row.id]]
            found[before.index] = replace(before, barred=(*before.barred, row))
        found += _cut([by_id[row.id] for row in one.rows], len(found), unit_utterances)
    return found


def begin(place: Store, units: Sequence[Unit], unit_utterances: int) -> list[Unit]:
    """The units of a new round over everything that is quarantined; none if one is under way or nothing is.

    Args:
        units: all units of the set so far.
    """
    rounds = _rounds(place)
    if rounds and not rounds[-1].is_over:
        print(f"{place.uri}: {rounds[-1].name} goes on; give the command again for audio mended since", flush=True)
        return []
    present = set(shards.parts_of(place))
    done = [unit.part for unit in units if unit.part in present and shards.is_committed(place, unit.part)]
    open_parts = {unit.part for unit in units} - set(done)
    waiting = {u.id for unit in units if unit.part in open_parts for u in unit.utterances}
    bad = {i: row for i, row in quarantine.rows_of(place, done).items() if i not in waiting}
    if not bad:
        print(f"{place.uri}: no quarantined utterance to run again", flush=True)
        return []
    by_id = {u.id: u for unit in units for u in unit.utterances}
    again = [u for u in by_id.values() if u.id in bad]
    first = Unit(len(units), ()).part
    rows = tuple(Quarantined(**{**bad[u.id], "attempts": 1}) for u in again)  # as its own part says
    one = _Round(f"{_PREFIX}{len(rounds) + 1:04d}{_SUFFIX}", first, rows, is_over=False)
    if not place.write_new(one.name, _json(one)):
        raise UserError(f"{place.uri}/{one.name} was written by another run just now; wait for that run to end")
    print(f"{place.uri}: {len(again)} quarantined utterances are run again, from {first}", flush=True)
    return _cut(again, len(units), unit_utterances)


def end(place: Store) -> None:
    """Let a round that is under way be over; call it only where no writer is at work."""
    for one in _rounds(place):
        if not one.is_over:
            place.sweep()
            place.write(one.name, _json(replace(one, is_over=True)))


def _cut(utterances: Sequence[Utterance], first: int, unit_utterances: int) -> list[Unit]:
    return [replace(unit, index=first + unit.index) for unit in manifest.cut_units(utterances, unit_utterances)]


def _rounds(place: Store) -> list[_Round]:
    rounds = []
    for name in place.names():
        if name.startswith(_PREFIX) and name.endswith(_SUFFIX):
            said = json.loads(place.read(name))
            try:
                rows = tuple(Quarantined(**row) for row in said["rows"])
                rounds.append(_Round(name, said["first_part"], rows, said["is_over"]))
            except (KeyError, TypeError):
                raise UserError(f"{place.uri}/{name} is no round of requeue; remove or restore it") from None
    return rounds


def _json(one: _Round) -> bytes:
    return files.json_bytes(
        {"first_part": one.first_part, "rows": [asdict(row) for row in one.rows], "is_over": one.is_over}
    )
