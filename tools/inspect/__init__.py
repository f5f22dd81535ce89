"""What is in a shard set: its tables, read; its shards, where one utterance is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sm_train import files
from sm_train.data import mds, shards
from sm_train.data.mirror import Mirror
from sm_train.errors import UserError
from tools.verify import MALFORMED, UTTERANCES, inside, reason

GB = 10**9


@dataclass
class Opened:
    """A set whose tables were read: a complete one's, or what the finished parts of an unfinished one say."""

    uri: str
    root: Path
    mirror: Mirror | None
    is_complete: bool
    contract: dict[str, Any]
    columns: dict[str, list[Any]]
    quarantine: list[dict[str, Any]]
    num_parts: int
    num_unfinished: int
    shard_bytes: list[int]

    def column(self, name: str) -> list[Any]:
        """A column of the table of utterances.

        Raises:
            UserError: there is none of that name.
        """
        if name not in self.columns:
            raise UserError(f"{self.uri}: its table has no column {name!r}; it is of another version, or no shard set")
        return self.columns[name]

    def numbers(self, name: str) -> NDArray[np.float64]:
        """A column of numbers.

        Raises:
            UserError: there is none of that name, or of that kind.
        """
        try:
            return np.array(self.column(name), np.float64)
        except (TypeError, ValueError):
            raise UserError(f"{self.uri}: column {name!r} of its table does not hold numbers") from None

    def row(self, number: int) -> dict[str, Any]:
        """One row of the table."""
        return {name: values[number] for name, values in self.columns.items()}


def open_set(place: str, target: str | None, cache: Path) -> Opened:
    """Read the tables of a set.

    Args:
        place: its folder or address; of a remote one the small files are fetched.
        target: one target set, which a remote set must be asked for with.
        cache: a folder for a remote set's files.

    Raises:
        UserError: it is no set, or its tables cannot be read.
    """
    mirror = None
    root = Path(place)
    if "://" in place:
        if target is None:
            raise UserError(f"{place}: a remote set is fetched with one of its target sets; name it with --targets")
        mirror = Mirror(place, cache, GB)
        mirror.refresh(target)
        root = mirror.root
    if not (root / shards.CONTRACT).exists() and not shards.is_complete(root):
        raise UserError(f"{place} is no shard set: it has no {shards.CONTRACT}")
    try:
        return _complete(place, root, mirror) if shards.is_complete(root) else _unfinished(place, root)
    except UserError:
        raise
    except MALFORMED as error:
        raise UserError(f"{place} cannot be read as a shard set ({reason(error)}); see tools.verify") from None


def _complete(place: str, root: Path, mirror: Mirror | None) -> Opened:
    contract = files.read_object(root / shards.DATASET)
    table = shards.read_table(root, UTTERANCES)
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    quarantine = shards.read_table(root, shards.QUARANTINE).to_pylist()
    sizes = [int(entry["raw_data"]["bytes"]) for entry in files.read_object(root / "index.json")["shards"]]
    num_parts = int(contract["num_parts"])
    return Opened(place, root, mirror, True, contract, columns, quarantine, num_parts, 0, sizes)


def _unfinished(place: str, root: Path) -> Opened:
    names = shards.parts_of(root)
    done = [name for name in names if shards.is_committed(root, name)]
    rows, quarantine, sizes = [], [], []
    for name in done:
        part = shards.read_part(root, name)
        rows += [{"ordinal": len(rows) + i, **row, "part": name} for i, row in enumerate(part["rows"])]
        quarantine += part["quarantined"]
        index = files.read_object(inside(root, f"{name}/index.json"))
        sizes += [int(entry["raw_data"]["bytes"]) for entry in index["shards"]]
    columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
    contract = files.read_object(root / shards.CONTRACT)
    return Opened(place, root, None, False, contract, columns, quarantine, len(done), len(names) - len(done), sizes)


def read_sample(found: Opened, row: dict[str, Any], columns: dict[str, str]) -> tuple[dict[str, Any], bool]:
    """The sample that a row of the table describes, and whether its bytes are those that were committed.

    Raises:
        UserError: it cannot be read, or is no longer readable as what it was.
    """
    name = f"{row['part']}/{row['shard']}"
    try:
        handle = found.mirror.open(name, lambda: None) if found.mirror else None
        path = found.root / name if found.mirror else inside(found.root, name)
        with mds.Shard(path, columns, handle) as shard:
            data = shard.read(int(row["index"]))
            return shard.decode(data), mds.digest(data) == row["xxh3"]
    except MALFORMED as error:
        raise UserError(f"{found.uri}/{name}: sample {row['index']} cannot be read ({reason(error)})") from None


def bars(counts: Sequence[int], edges: Sequence[float], unit: str, width: int = 40) -> list[str]:
    """A histogram as text: a line a bin, its count and a bar."""
    most, width_of_bin = max([*counts, 1]), edges[1] - edges[0]
    digits = next((d for d in range(6) if abs(round(width_of_bin, d) - width_of_bin) < 1e-9), 6)
    size = len(f"{edges[-1]:.{digits}f}")
    lines = []
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        bar = "#" * -(-count * width // most)
        lines.append(f"{low:{size}.{digits}f} to {high:{size}.{digits}f}{unit} {count:>10,}  {bar}".rstrip())
    return lines
