"""Shard sets: parts that are whole or absent, and the tables that describe them.

A set is a folder of parts. ``contract.json`` says what the set is and is written first; a part is complete the moment
its folder carries its name; ``dataset.json`` is written last and makes the set complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sm_train import config, files
from sm_train.data import mds
from sm_train.errors import UserError
from sm_train.records import Quarantined

DONE = "_DONE.json"
DATASET = "dataset.json"
CONTRACT = "contract.json"
QUARANTINE = "quarantine.parquet"


def open_set(root: Path, contract: Mapping[str, Any]) -> None:
    """Start or continue a set: once there is a part, its contract must stay the same.

    Raises:
        UserError: the folder holds a set with another contract, or something that is no set.
    """
    path = root / CONTRACT
    if path.exists() and any(root.glob("part-*")):
        require_same(dict(contract), files.read_json(path), str(root), "give another folder, or remove this one")
        return
    if not path.exists() and root.exists() and any(not entry.name.startswith(".") for entry in root.iterdir()):
        raise UserError(
            f"folder {root} is not empty and holds no shard set ({CONTRACT} is missing); give another folder"
        )
    files.write_json(path, contract)


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


def is_complete(root: Path) -> bool:
    """Whether the whole set is there."""
    return (root / DATASET).exists()


def is_committed(root: Path, part: str) -> bool:
    """Whether a part is there, whole."""
    return (root / part / DONE).exists()


def write_part(
    root: Path,
    part: str,
    columns: Mapping[str, str],
    samples: Iterable[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    quarantined: Sequence[Quarantined],
    facts: Mapping[str, Any],
) -> None:
    """Write one part: aside, read back, synced, renamed. Killed at any point, it is whole or absent.

    Args:
        samples: what goes into the shards.
        rows: what the set's table says of each sample, in the same order.
        quarantined: the rows of this part that were left out.
        facts: what the writer learned that must be the same for all parts; it joins the set's contract.
    """
    aside = root / f"{files.ASIDE}{part}-{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    refs = mds.write(aside, columns, samples)
    done = {
        "rows": [{**row, **asdict(ref)} for row, ref in zip(rows, refs, strict=True)],
        "quarantined": [asdict(row) for row in quarantined],
        "facts": dict(facts),
        "files": {path.name: mds.file_digest(path) for path in sorted(aside.iterdir())},
    }
    files.write_json(aside / DONE, done)
    files.publish_folder(aside, root / part, DONE)


def read_part(root: Path, part: str) -> dict[str, Any]:
    """What a committed part says of itself: rows, quarantined, facts, files."""
    done: dict[str, Any] = files.read_json(root / part / DONE)
    return done


def remove_part(root: Path, part: str) -> None:
    """Take a part out of an incomplete set, at once and whole."""
    aside = root / f"{files.ASIDE}removed-{part}-{os.getpid()}"
    os.rename(root / part, aside)
    shutil.rmtree(aside)


def remove_leftovers(root: Path) -> None:
    """Remove what killed writers left aside; call it only where no writer is at work."""
    for path in root.glob(f"{files.ASIDE}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def commit(root: Path, parts: Sequence[str], contract: Mapping[str, Any], table_name: str) -> None:
    """Join the parts of a set, on which nobody works any more, and complete it: ``dataset.json`` is written last.

    Raises:
        UserError: no sample is in any part, or two parts state different facts.
    """
    remove_leftovers(root)
    tables, quarantined, shard_entries, part_hashes = [], [], [], {}
    facts = read_part(root, parts[0])["facts"]
    num_rows = 0
    for part in parts:
        done = read_part(root, part)
        require_same(facts, done["facts"], str(root / part), "remove the part and run the same command again")
        if done["rows"]:
            rows = [{"ordinal": num_rows + i, **row, "part": part} for i, row in enumerate(done["rows"])]
            tables.append(pa.Table.from_pylist(rows))
            num_rows += len(rows)
        quarantined += done["quarantined"]
        part_hashes[part] = mds.file_digest(root / part / DONE)
        for entry in files.read_json(root / part / "index.json")["shards"]:
            entry["raw_data"]["basename"] = f"{part}/{entry['raw_data']['basename']}"
            shard_entries.append(entry)
    if not tables:
        first = f"; the first: {quarantined[0]['id']!r}, {quarantined[0]['detail']}" if quarantined else ""
        raise UserError(f"{root}: all {len(quarantined)} utterances are quarantined{first}")
    write_table(root / table_name, pa.concat_tables(tables).combine_chunks())
    write_table(root / QUARANTINE, pa.Table.from_pylist(quarantined, schema=_QUARANTINE_SCHEMA))
    files.write_text(root / "index.json", json.dumps({"shards": shard_entries, "version": 2}, sort_keys=True))
    counts = {"num_committed": num_rows, "num_quarantined": len(quarantined), "num_parts": len(parts)}
    table_hashes = {name: mds.file_digest(root / name) for name in (table_name, QUARANTINE)}
    hashes = {"part_hashes": config.fingerprint(part_hashes), "table_hashes": table_hashes}
    files.write_json(root / DATASET, {**contract, **facts, **counts, **hashes})


_QUARANTINE_SCHEMA = pa.schema(
    [("id", pa.string()), ("reason", pa.string()), ("detail", pa.string()), ("attempts", pa.int32())]
)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table as Parquet, whole or not at all."""
    files.write_whole(path, lambda aside: pq.write_table(table, aside))


def read_table(root: Path, table_name: str) -> pa.Table:
    """A table of a complete set, verified.

    Raises:
        UserError: the set is absent or not complete, or its table is not the one that was committed with it.
    """
    if not is_complete(root):
        state = "is not complete; run its precompute command again" if root.exists() else "does not exist"
        raise UserError(f"shard set {root} {state}")
    path, hashes = root / table_name, files.read_json(root / DATASET).get("table_hashes")
    again = f"remove {root / DATASET} and run the command that made the set again (its parts stay)"
    if hashes is None:
        raise UserError(f"{root / DATASET} has no table_hashes: an older version wrote it; {again}")
    if not path.exists() or mds.file_digest(path) != hashes[table_name]:
        raise UserError(f"{path} is missing or not the table that was committed; restore it, or {again}")
    return pq.read_table(path)
