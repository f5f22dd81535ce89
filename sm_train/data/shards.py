"""Shard sets: parts that are whole or absent, and the tables that describe them.

A set is a folder of parts, or a prefix of an object store. ``contract.json`` says what the set is and is written first;
a part is complete the moment its ``_DONE.json`` stands under its name; ``dataset.json`` is written last and makes the
set complete.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sm_train import config, files
from sm_train.data import arrival, mds, mds_writer, store
from sm_train.data.joined import Joined
from sm_train.data.store import Place, Store
from sm_train.errors import UserError
from sm_train.records import Quarantined

DONE = "_DONE.json"
DATASET = "dataset.json"
CONTRACT = "contract.json"
QUARANTINE = "quarantine.parquet"
SUBMITTED = "submitted"
"""What a submission keeps in the folder of what it makes (cluster.submission); no part of the set."""
_PART = "part-"
_READERS = 16  # small files fetched at once
_STRINGS = [(name, pa.string()) for name in ("id", "reason", "detail")]
_QUARANTINE_SCHEMA = pa.schema([*_STRINGS, ("attempts", pa.int32())])


def open_set(root: Place, contract: Mapping[str, Any], *, beside_others: bool = False) -> None:
    """Start or continue a set: once there is a part, its contract must stay the same.

    Args:
        beside_others: several may open the set at once; the first one's contract counts, parts or not.

    Raises:
        UserError: the folder holds a set with another contract, or something that is no set.
    """
    place = store.at(root)
    names = {*place.names()} - {SUBMITTED}
    if beside_others and not names:
        place.write_new(CONTRACT, files.json_bytes(contract))
        names = {CONTRACT}
    if CONTRACT in names and (beside_others or parts_of(place)):
        found = files.parse_object(place.read(CONTRACT), f"{place.uri}/{CONTRACT}")
        require_same(dict(contract), found, place.uri, "give another folder, or remove this one")
        return
    if CONTRACT not in names and names:
        raise UserError(
            f"folder {place.uri} is not empty and holds no shard set ({CONTRACT} is missing); give another folder"
        )
    place.write(CONTRACT, files.json_bytes(contract))


def require_same(wanted: Mapping[str, Any], found: Mapping[str, Any], where: str, remedy: str) -> None:
    """Compare two contracts field by field.

    Raises:
        UserError: a field differs; it is named with both values and the remedy.
    """
    for name in dict.fromkeys([*wanted, *found]):
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{where}: {name} is {found.get(name)!r} there, but {wanted.get(name)!r} is asked for; {remedy}"
            )


def is_complete(root: Place) -> bool:
    """Whether the whole set is there."""
    return store.at(root).exists(DATASET)


def is_committed(root: Place, part: str) -> bool:
    """Whether a part is there, whole."""
    return store.at(root).exists(f"{part}/{DONE}")


def committed(root: Place, parts: Sequence[str]) -> set[str]:
    """Those of some parts that are there, whole."""
    place = store.at(root)
    begun = set(parts_of(place))
    asked = [part for part in parts if part in begun]
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda part: is_committed(place, part), asked)
        return {part for part, is_there in zip(asked, found, strict=True) if is_there}


def parts_of(root: Place) -> list[str]:
    """The names under which parts are, or begin to be, there."""
    return [name for name in store.at(root).names() if name.startswith(_PART)]


def write_part(
    root: Place,
    part: str,
    columns: Mapping[str, str],
    samples: Iterable[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    quarantined: Sequence[Quarantined],
    facts: Mapping[str, Any],
) -> None:
    """Write one part: aside, read back, then published. Killed at any point, it is whole or absent.

    Args:
        samples: what goes into the shards.
        rows: what the set's table says of each sample, in the same order.
        quarantined: the rows of this part that were left out.
        facts: what the writer learned that must be the same for all parts; it joins the set's contract.
    """
    place = store.at(root)
    try:
        aside = place.scratch(part)
        refs, digests = mds_writer.write(aside, columns, samples)
        done = {
            "rows": [{**row, **asdict(ref)} for row, ref in zip(rows, refs, strict=True)],
            "quarantined": [asdict(row) for row in quarantined],
            "facts": dict(facts),
            "files": digests,
        }
        files.write_json(aside / DONE, done)
        place.publish(aside, part, DONE)
    except OSError as error:
        error.filename = error.filename or place.uri  # a full disk does not say which
        raise


def read_part(root: Place, part: str) -> dict[str, Any]:
    """What a committed part says of itself: rows, quarantined, facts, files."""
    place = store.at(root)
    return _done(place.read(f"{part}/{DONE}"), f"{place.uri}/{part}")


def _done(data: bytes, where: str) -> dict[str, Any]:
    done = files.parse_object(data, f"{where}/{DONE}")
    kinds = {"rows": list, "quarantined": list, "facts": dict, "files": dict}
    if not all(isinstance(done.get(name), kind) for name, kind in kinds.items()):
        raise UserError(f"{where}/{DONE} is no part's record: it needs {', '.join(kinds)}; remove the part")
    return done


def read_parts(root: Place, parts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What each of some committed parts says of itself, in their order; several are read side by side."""
    place = store.at(root)
    with ThreadPoolExecutor(_READERS) as pool:
        yield from pool.map(lambda part: read_part(place, part), parts)


def remove_leftovers(root: Place) -> None:
    """Remove what killed writers left aside; call it only where no writer is at work."""
    store.at(root).sweep()


def commit(root: Place, parts: Sequence[str], contract: Mapping[str, Any], table_name: str) -> None:
    """Join the parts of a set, on which nobody works any more, and complete it: ``dataset.json`` is written last.

    A set that was complete and has got more parts is openly incomplete while its tables are written. An utterance that
    one part quarantined and a later one holds is committed; one that several quarantined is as the last one says, its
    attempts added up.

    Raises:
        UserError: no sample is in any part, one is in two of them, or two parts state different facts; the set stays
            as it was.
    """
    place = store.at(root)
    remove_leftovers(place)
    found = _join(place, parts)
    quarantined = list(found.quarantined.values())
    if not found.tables:
        first = f"; the first: {quarantined[0]['id']!r}, {quarantined[0]['detail']}" if quarantined else ""
        raise UserError(f"{place.uri}: all {len(quarantined)} utterances are quarantined{first}")
    place.remove(DATASET)
    hashes = {}
    for name, table in (
        (table_name, pa.concat_tables(found.tables).combine_chunks()),
        (QUARANTINE, pa.Table.from_pylist(quarantined, schema=_QUARANTINE_SCHEMA)),
    ):
        buffer = BytesIO()
        pq.write_table(table, buffer)
        hashes[name] = mds.digest(buffer.getvalue())
        place.write(name, buffer.getvalue())
    index = json.dumps({"shards": found.shards, "version": 2}, sort_keys=True)
    place.write("index.json", index.encode())
    counts = {"num_committed": len(found.part_of), "num_quarantined": len(quarantined), "num_parts": len(parts)}
    of_parts = {"part_hashes": config.fingerprint(found.part_hashes), "table_hashes": hashes}
    place.write(DATASET, files.json_bytes({**contract, **found.facts, **counts, **of_parts}))


def _join(place: Store, parts: Sequence[str]) -> Joined:
    found, facts = Joined(place.uri), dict[str, Any]()
    with ThreadPoolExecutor(_READERS) as pool:
        read = pool.map(lambda part: (place.read(f"{part}/{DONE}"), _read_index(place, part)), parts)
        for part, (done_bytes, index_bytes) in zip(parts, read, strict=True):
            where = f"{place.uri}/{part}"
            done = _done(done_bytes, where)
            facts = facts or done["facts"]
            require_same(facts, done["facts"], where, "remove the part and run the same command again")
            found.add(part, done, mds.digest(done_bytes), json.loads(index_bytes))
    found.facts = facts
    return found


def _read_index(place: Store, part: str) -> bytes:
    if "://" not in place.uri:
        arrival.wait_for(Path(place.uri) / part / "index.json")
    return place.read(f"{part}/index.json")


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table as Parquet, whole or not at all."""
    files.write_whole(path, lambda aside: pq.write_table(table, aside))


def read_table(root: Path, table_name: str) -> pa.Table:
    """A table of a complete set in a folder, verified.

    Raises:
        UserError: the set is absent or not complete, or its table is not the one that was committed with it.
    """
    if not is_complete(root):
        state = "is not complete; run its precompute command again" if root.exists() else "does not exist"
        raise UserError(f"shard set {root} {state}")
    path, hashes = root / table_name, files.read_object(root / DATASET).get("table_hashes")
    again = f"remove {root / DATASET} and run the command that made the set again (its parts stay)"
    if hashes is None:
        raise UserError(f"{root / DATASET} has no table_hashes: an older version wrote it; {again}")
    if not isinstance(hashes, dict) or not arrival.wait_for(path) or mds.file_digest(path) != hashes.get(table_name):
        raise UserError(f"{path} is missing or not the table that was committed; restore it, or {again}")
    return read_parquet(path)


def read_parquet(path: Path) -> pa.Table:
    """A table in a file.

    Raises:
        UserError: it cannot be read as Parquet.
    """
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from None
