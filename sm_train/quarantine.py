"""Which utterances of a set are quarantined, and when that is too many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from sm_train.data import shards
from sm_train.data.joined import take_quarantined
from sm_train.data.store import Store
from sm_train.errors import UserError
from sm_train.meter import Event
from sm_train.records import Quarantined, Receipt, Unit


class TooManyQuarantined(UserError):
    """A larger share of the manifest is quarantined than is allowed."""


def rows_of(place: Store, parts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What committed parts say together, by id; see :func:`sm_train.data.joined.take_quarantined`."""
    rows: dict[str, dict[str, Any]] = {}
    for done in shards.read_parts(place, list(parts)):
        take_quarantined(rows, done["quarantined"], done["rows"])
    return rows


class Tally:
    """Counts quarantined utterances while a set is made, so that a run stops as soon as they are too many for certain.

    Args:
        done: units whose parts are there.
        todo: the others; those of their utterances that an earlier part quarantined get another chance.
        share: of the manifest's utterances, what may be quarantined.
    """

    def __init__(self, place: Store, done: Sequence[Unit], todo: Sequence[Unit], share: float) -> None:
        self._place, self._share = place, share
        self._done = [unit.part for unit in done]
        self._todo = {unit.part: [u.id for u in unit.utterances] for unit in todo}
        ids = {u.id for unit in todo for u in unit.utterances}
        self._num_utterances = len(ids | {u.id for unit in done for u in unit.utterances})
        self._count = len(rows_of(place, self._done).keys() - ids)
        self._barred: dict[str, list[Quarantined]] = {}
        self._require()

    def add(self, event: Event) -> None:
        """Count what a receipt says, and who was barred before his unit's receipt is there.

        Raises:
            TooManyQuarantined: whatever comes, they are more than is allowed.
        """
        if isinstance(event, Receipt):
            self._barred.pop(event.part, None)
            self._todo.pop(event.part, None)
            self._done.append(event.part)
            self._count += event.num_quarantined
        elif event.row:
            self._barred.setdefault(event.part, []).append(event.row)
        else:
            return
        self._require()

    def report(self) -> None:
        """Print what is quarantined, once every unit is done."""
        if rows := rows_of(self._place, sorted(self._done)) if self._count else {}:
            of_all = f"{len(rows)} of {self._num_utterances} utterances"
            print(f"{self._place.uri}: {of_all} quarantined ({by_reason(rows.values())})", flush=True)

    def _require(self) -> None:
        barred = [asdict(row) for rows in self._barred.values() for row in rows]
        if self._count + len(barred) > self._share * self._num_utterances:
            waiting = {i for ids in self._todo.values() for i in ids}
            rows = [row for i, row in rows_of(self._place, sorted(self._done)).items() if i not in waiting]
            refuse_above(self._share, rows + barred, self._num_utterances)


def refuse_above(share: float, rows: Sequence[dict[str, Any]], num_utterances: int) -> None:
    """End the run where so many quarantined rows are too many.

    Raises:
        TooManyQuarantined: with counts by reason and the first example.
    """
    if len(rows) <= share * num_utterances:
        return
    first = rows[0]
    raise TooManyQuarantined(
        f"{len(rows)} of {num_utterances} utterances are quarantined ({by_reason(rows)}), above max_quarantined_share "
        f"{share:g}; the first is {first['id']!r}: {first['detail']}. "
        "Mend the audio files and run again with requeue=true, or raise max_quarantined_share and run "
        "again (a changed manifest needs another out folder)"
    )


def by_reason(rows: Iterable[dict[str, Any]]) -> str:
    """Counts of rows by reason, the most frequent first."""
    return ", ".join(f"{count} {reason}" for reason, count in Counter(row["reason"] for row in rows).most_common())
