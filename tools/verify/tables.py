"""A set's tables, index and ``dataset.json``, held against its parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sm_train import config
from sm_train.data import shards
from sm_train.data.joined import take_quarantined
from sm_train.errors import UserError
from sm_train.records import Utterance
from tools.verify import MALFORMED, Problem, differing, digest_of, read_inside, reason, short
from tools.verify.parts import CheckSample, Part, check_part

_NAMED = 3  # ids named where many are wrong alike


@dataclass
class Checked:
    """What was found in a set of parts."""

    root: Path
    remedy: str
    problems: list[Problem] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    dataset: dict[str, Any] = field(default_factory=dict)
    table: list[dict[str, Any]] = field(default_factory=list)
    num_bytes: int = 0

    def wrong(self, file: str, what: str, remedy: str | None = None) -> None:
        """Note a problem; its remedy is the set's own unless it has another, or none."""
        self.problems.append(Problem(str(self.root / file), what, self.remedy if remedy is None else remedy))


def check_parts(
    found: Checked, columns: Mapping[str, str], check_sample: CheckSample, jobs: int, advance: Callable[[Part], None],
    part_remedy: str,
) -> None:  # fmt: skip
    """Check every part, several at once."""
    names = shards.parts_of(found.root)
    whole = [name for name in names if shards.is_committed(found.root, name)]
    for name in sorted(set(names) - set(whole)):
        found.wrong(name, f"it has no {shards.DONE}: it is not whole", part_remedy)
    with ThreadPoolExecutor(jobs) as pool:
        for part in pool.map(lambda name: check_part(found.root, name, columns, check_sample, part_remedy), whole):
            found.parts.append(part)
            found.problems += part.problems
            found.num_bytes += part.num_bytes
            advance(part)
    ids = Counter(row["id"] for part in found.parts for row in part.rows)
    twice = [name for name, count in ids.items() if count > 1]
    if twice:
        found.wrong("", f"{len(twice)} ids are committed more than once: {some(twice)}")
    for part in found.parts[1:]:
        for said in differing(found.parts[0].facts, part.facts, {**found.parts[0].facts, **part.facts}):
            part_file = f"{part.name}/{shards.DONE}"
            found.wrong(part_file, f"{said}, as in {found.parts[0].name}", part_remedy)


def read_dataset(found: Checked) -> None:
    """``dataset.json`` against ``contract.json``; an absent one is a problem."""
    if not shards.is_complete(found.root):
        found.wrong(shards.DATASET, "it is not there: the set is not complete", "run the command that makes it again")
        return
    try:
        contract = read_inside(found.root, shards.CONTRACT)
        found.dataset = read_inside(found.root, shards.DATASET)
        for said in differing(contract, found.dataset, contract):
            found.wrong(shards.DATASET, f"{said} as in {shards.CONTRACT}")
    except MALFORMED as error:
        found.wrong(shards.DATASET, reason(error))


def check_tables(found: Checked, table_name: str) -> None:
    """The tables of a complete set against its parts' rows, ``dataset.json`` against both."""
    dataset = found.dataset
    digests = {part.name: part.digest for part in found.parts}
    facts = found.parts[0].facts if found.parts else {}
    wanted = {"part_hashes": config.fingerprint(digests), "num_parts": len(found.parts), **facts}
    for name, check in ((table_name, _check_rows), (shards.QUARANTINE, _check_quarantine)):
        try:
            size = digest_of(found.root / name)[1] if (found.root / name).is_file() else 0
            rows = shards.read_table(found.root, name).to_pylist()
            found.num_bytes += size
            wanted["num_committed" if check is _check_rows else "num_quarantined"] = len(rows)
            check(found, name, rows)
        except UserError as error:
            found.wrong(name, str(error).removeprefix(f"{found.root / name} "), remedy="")
        except MALFORMED as error:
            found.wrong(name, reason(error))
    for said in differing(wanted, dataset, wanted):
        found.wrong(shards.DATASET, f"{said} as in the parts")
    try:
        index = read_inside(found.root, "index.json")["shards"]
        by_name = {entry["raw_data"]["basename"]: entry for entry in index}
        ours = {entry["raw_data"]["basename"]: entry for part in found.parts for entry in part.shards}
        for name in sorted({**by_name, **ours}):
            if by_name.get(name) != ours.get(name):
                state = "names a shard that no part has" if name not in ours else "lacks, or gives otherwise, the shard"
                found.wrong("index.json", f"it {state}: {short(name)!r}")
        if len(by_name) != len(index):
            found.wrong("index.json", "it names a shard twice")
    except MALFORMED as error:
        found.wrong("index.json", f"it cannot be read ({reason(error)})")


def _check_rows(found: Checked, name: str, table: list[dict[str, Any]]) -> None:
    found.table = table
    by_part = {part.name: part for part in found.parts}
    order = list(dict.fromkeys(str(row["part"]) for row in table))
    for part in order:
        if part not in by_part:
            found.wrong(name, f"it names the part {short(part)!r}, which is not in the set")
    rest = [part.name for part in found.parts if part.name not in order and part.rows]
    wanted = [{**row, "part": part} for part in [*order, *rest] if part in by_part for row in by_part[part].rows]
    wanted = [{"ordinal": number, **row} for number, row in enumerate(wanted)]
    if wanted == table:
        return
    pairs = zip(wanted, table, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(wanted), len(table)))
    said = f"{len(table)} rows against {len(wanted)} of the parts"
    if first < min(len(wanted), len(table)):
        said = "; ".join(differing(wanted[first], table[first], {**wanted[first], **table[first]}))
    found.wrong(name, f"it is not the parts' rows in order; from row {first} on: {said}")


def _check_quarantine(found: Checked, name: str, table: list[dict[str, Any]]) -> None:
    committed = {row["id"] for part in found.parts for row in part.rows}
    wanted, listed = _quarantine_of(found.parts), [row["id"] for row in table]
    if both := committed & set(listed):
        found.wrong(name, f"{len(both)} ids are both committed and quarantined: {some(both)}")
    if odd := (wanted.keys() ^ set(listed)) - committed:
        found.wrong(name, f"{len(odd)} ids are in it or in the parts' quarantine, not in both: {some(odd)}")
    if len(set(listed)) < len(listed):
        found.wrong(name, "an id is in it twice")
    strange = [row for row in table if row["id"] in wanted and row != wanted[row["id"]]]
    if strange:
        first = wanted[strange[0]["id"]]
        said = "; ".join(differing(first, strange[0], {**first, **strange[0]}))
        ids = some(row["id"] for row in strange)
        found.wrong(name, f"{len(strange)} rows are not what the parts say together: {ids}; in the first, {said}")


def _quarantine_of(parts: Iterable[Part]) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for part in parts:
        take_quarantined(rows, part.quarantined, part.rows)
    return rows


def check_inputs(found: Checked, ids: Sequence[str], source: str) -> None:
    """Inputs = committed + quarantined."""
    have = {row["id"] for part in found.parts for row in [*part.rows, *part.quarantined]}
    for state, names in (("neither committed nor quarantined", set(ids) - have), ("unknown to it", have - set(ids))):
        if names:
            found.wrong("", f"against {source}: {len(names)} ids are {state}: {some(names)}")


def check_manifest(found: Checked, utterances: Sequence[Utterance], digest: str, path: Path | str) -> None:
    """The manifest that the set was made of: every id has its place, and the manifest is that one."""
    check_inputs(found, [u.id for u in utterances], f"manifest {path}")
    try:
        contract = found.dataset or read_inside(found.root, shards.CONTRACT)
    except MALFORMED as error:
        found.wrong(shards.CONTRACT, reason(error))
        return
    for said in differing({"manifest_hash": digest}, contract, ["manifest_hash"]):
        remedy = "give the manifest that the set was made of"
        found.wrong(shards.DATASET, f"{said}, that of {path}", remedy)


def some(ids: Iterable[str]) -> str:
    """A few of many ids."""
    names = sorted(ids)
    return ", ".join(repr(short(name)) for name in names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
