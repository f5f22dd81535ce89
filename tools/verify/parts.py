"""One part of a set, held against what it says of itself.

Shape letters: T frames, E encoder width, L tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sm_train.data import mds
from sm_train.data.shards import DONE
from tools.verify import MALFORMED, Problem, digest_of, inside, reason, short

_HALF_EXPONENT = 0x7C00  # all of these bits: infinite or NaN

CheckSample = Callable[[Mapping[str, Any], Mapping[str, Any]], str | None]
"""(the row that describes it, the sample) -> what is wrong, if anything."""


@dataclass
class Part:
    """What a part holds, as far as it could be read, and what is wrong with it."""

    root: Path
    name: str
    remedy: str
    problems: list[Problem] = field(default_factory=list)
    digest: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    quarantined: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    shards: list[dict[str, Any]] = field(default_factory=list)
    """Of its index.json, with the part in the names."""
    num_bytes: int = 0

    def wrong(self, file: str, what: str) -> None:
        """Note a problem."""
        self.problems.append(Problem(f"{self.root / self.name}/{short(file)}", what, self.remedy))


def check_part(root: Path, name: str, columns: Mapping[str, str], check_sample: CheckSample, remedy: str) -> Part:
    """Read every byte of a part.

    Args:
        columns: what its shards hold.
        remedy: what to do about whatever is wrong.
    """
    part = Part(root, name, remedy)
    hashes = _read_done(root, part)
    if hashes is None:
        return part
    for file, wanted in hashes.items():
        try:
            if "/" in file or file in (".", ".."):
                raise ValueError("a name with a path in it; nothing outside the part is read")
            found, size = digest_of(inside(root, f"{name}/{file}"))
            part.num_bytes += size
            if found != wanted:
                part.wrong(file, f"its xxh3 is {found}, not {short(wanted)}")
        except MALFORMED as error:
            part.wrong(file, reason(error))
    for path in sorted((root / name).iterdir()):
        if path.name not in hashes and path.name != DONE:
            part.wrong(path.name, f"{DONE} does not name it")
    try:
        _check_index(root, part, hashes)
    except MALFORMED as error:
        part.wrong("index.json", f"it cannot be read ({reason(error)})")
    _check_rows(root, part, columns, check_sample)
    return part


def _read_done(root: Path, part: Part) -> dict[str, Any] | None:
    """The hashes of a part's files; its rows, quarantine and facts go into ``part``."""
    try:
        data = inside(root, f"{part.name}/{DONE}").read_bytes()
        part.digest = mds.digest(data)
        done = json.loads(data)
        kinds = {"rows": list, "quarantined": list, "facts": dict, "files": dict}
        wrong = [key for key, kind in kinds.items() if not isinstance(done[key], kind)]
        rows = [*done["rows"], *done["quarantined"]]
        if wrong or not all(isinstance(row, dict) and isinstance(row["id"], str) for row in rows):
            raise ValueError(f"{', '.join(wrong) or 'a row'} is not of the form of a part's record")
        part.rows, part.quarantined, part.facts = done["rows"], done["quarantined"], done["facts"]
        return dict(done["files"])
    except MALFORMED as error:
        part.wrong(DONE, f"it cannot be read ({reason(error)})")
        return None


def _check_index(root: Path, part: Part, hashes: Mapping[str, str]) -> None:
    for entry in json.loads(inside(root, f"{part.name}/index.json").read_bytes())["shards"]:
        file = entry["raw_data"]["basename"]
        entry["raw_data"]["basename"] = f"{part.name}/{file}"
        part.shards.append(entry)
        if file not in hashes:
            part.wrong("index.json", f"it names the shard {short(file)!r}, which {DONE} does not")
            continue
        path = inside(root, f"{part.name}/{file}")
        size = path.stat().st_size
        if size != entry["raw_data"]["bytes"]:
            part.wrong("index.json", f"{file} has {size} bytes, not {short(entry['raw_data']['bytes'])}")
        with mds.Shard(path) as shard:
            if shard.num_samples != entry["samples"]:
                part.wrong("index.json", f"{file} has {shard.num_samples} samples, not {short(entry['samples'])}")


def _check_rows(root: Path, part: Part, columns: Mapping[str, str], check_sample: CheckSample) -> None:
    """Every sample against its row, and every row against its sample."""
    files: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in part.rows:
        try:
            of_file = files.setdefault(str(row["shard"]), {})
            if of_file.setdefault(int(row["index"]), row) is not row:
                part.wrong(DONE, f"two rows lie at {short(row['shard'])}, {row['index']}; one is {_id(row)}")
        except MALFORMED as error:
            part.wrong(DONE, f"row {_id(row)} has no place ({reason(error)})")
    for file, rows in files.items():
        try:
            with mds.Shard(inside(root, f"{part.name}/{file}"), columns) as shard:
                for index in sorted(rows.keys() | set(range(shard.num_samples))):
                    said = _wrong_sample(shard, index, rows.get(index), check_sample)
                    if said:
                        part.wrong(file, said)
        except MALFORMED as error:
            part.wrong(file, reason(error))


def _wrong_sample(shard: mds.Shard, index: int, row: Mapping[str, Any] | None, check_sample: CheckSample) -> str | None:
    if row is None:
        return f"sample {index} is in no row of {DONE}"
    try:
        data = shard.read(index)
        if mds.digest(data) != row["xxh3"]:
            return f"{_id(row)}: its xxh3 is {mds.digest(data)}, not {short(row['xxh3'])}"
        sample = shard.decode(data)
        if sample["id"] != row["id"]:
            return f"sample {index} is of {short(sample['id'])!r}, its row of {_id(row)}"
        said = check_sample(row, sample)
        return said and f"{_id(row)}: {said}"
    except MALFORMED as error:
        return f"{_id(row)}: {reason(error)}"


def _id(row: Mapping[str, Any]) -> str:
    return repr(short(row.get("id")))


def check_feats(width: object) -> CheckSample:
    """A check of one utterance's features: [T, E] with T as the row says, and finite."""

    def check(row: Mapping[str, Any], sample: Mapping[str, Any]) -> str | None:
        feats_TE: NDArray[np.float16] = sample["feats"]
        if feats_TE.shape != (row["num_frames"], width):
            return f"its features are of shape {feats_TE.shape}, not ({short(row['num_frames'])}, {width})"
        bits = feats_TE.view(np.uint16) & _HALF_EXPONENT
        return "a feature is NaN or infinite" if (bits == _HALF_EXPONENT).any() else None

    return check
