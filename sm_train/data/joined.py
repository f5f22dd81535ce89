"""What the parts of a set say together, one after the other: the rows of its tables, its shards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from sm_train.errors import UserError

Row = Mapping[str, Any]


def take_quarantined(rows: dict[str, dict[str, Any]], quarantined: Iterable[Row], committed: Iterable[Row]) -> None:
    """Take in what one more part says of whom it quarantined and whom it holds.

    Args:
        rows: what the parts before it say together, by id: the last word, attempts added up, without those that a part
            holds.
    """
    for row in quarantined:
        attempts = rows.get(row["id"], {"attempts": 0})["attempts"]
        rows[row["id"]] = {**row, "attempts": attempts + row["attempts"]}
    for row in committed:
        rows.pop(row["id"], None)


@dataclass
class Joined:
    """Parts so far, in their order."""

    where: str
    """The set, for messages."""
    tables: list[pa.Table] = field(default_factory=list)
    quarantined: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By id; see :func:`take_quarantined`."""
    shards: list[dict[str, Any]] = field(default_factory=list)
    """Entries of the merged MDS index."""
    part_hashes: dict[str, str] = field(default_factory=dict)
    part_of: dict[str, str] = field(default_factory=dict)
    """The part that holds each committed id."""
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, part: str, done: Mapping[str, Any], digest: str, index: Mapping[str, Any]) -> None:
        """Take in one more part.

        Args:
            done: what its ``_DONE.json`` says, and ``digest`` that file's hash.
            index: its own MDS index.

        Raises:
            UserError: an utterance is in two parts.
        """
        rows = [{"ordinal": len(self.part_of) + i, **row, "part": part} for i, row in enumerate(done["rows"])]
        if rows:
            self.tables.append(pa.Table.from_pylist(rows))
        take_quarantined(self.quarantined, done["quarantined"], rows)
        for row in rows:
            other = self.part_of.setdefault(row["id"], part)
            if other != part:
                raise UserError(
                    f"{self.where}: utterance {row['id']!r} is in {other} and in {part}; remove one of them"
                )
        self.part_hashes[part] = digest
        for entry in index["shards"]:
            raw = {**entry["raw_data"], "basename": f"{part}/{entry['raw_data']['basename']}"}
            self.shards.append({**entry, "raw_data": raw})
