"""The one writer of importers: entries are measured, checked, sorted, and written whole."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from sm_train import files
from sm_train.data import audio
from sm_train.data.manifest import wrong_id
from sm_train.errors import UserError
from sm_train.records import Utterance
from tools.corpora.entries import Entry, Skipped, code, one_line

MANIFEST, INSTRUCTIONS = "manifest.parquet", "instructions.parquet"
SNAP_S = 0.01
"""A segment that ends this close to its file's end ends with it: corpora round times to hundredths."""
_BLOCK = 4096
_STRINGS = ("id", "audio", "text", "lang", "speaker", "split")
_MANIFEST_SCHEMA = pa.schema(
    [
        (name, pa.string() if name in _STRINGS else pa.float64())
        for name in ("id", "audio", "start_s", "duration_s", "text", "lang", "speaker", "split")
    ]
)
_INSTRUCTIONS_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("utterance_id", "task", "variables", "target_lang", "answer")]
)
Row = dict[str, Any]
Measured = audio.Header | audio.BadAudio


def write(found: Iterable[Entry], out: Path, asked: Namespace, skipped: Skipped) -> str:
    """Write ``out/manifest.parquet`` and ``out/instructions.parquet``; returns what to say about them.

    Utterances are sorted by id. Of entries with one id the first good one is taken. Equal entries give equal bytes.

    Raises:
        UserError: no entry is good, or an option is wrong.
    """
    speaker_of = _speaker_pattern(asked.speaker_from)
    entries = [entry for entry in found if _has_text(entry, skipped)]
    headers = measure([entry.audio for entry in entries], asked.workers)
    place = Places(out, asked.absolute)
    good: dict[str, tuple[Utterance, Entry]] = {}
    for entry in entries:
        first = good.get(entry.id)
        if first:
            skipped.add("duplicate_id", entry.where, f"id {entry.id!r} is in {first[1].where} already")
            continue
        try:
            start_s, duration_s = _segment(entry, headers[entry.audio])
        except audio.BadAudio as error:
            skipped.add(error.reason, entry.where, str(error))
            continue
        speaker = entry.speaker or speaker_of(entry.id)
        lang, split = code(entry.lang or asked.lang or ""), entry.split or asked.split or "train"
        utterance = Utterance(
            entry.id, place.of(entry.audio), start_s, duration_s, one_line(entry.text), lang, speaker, split
        )
        good[entry.id] = (utterance, entry)
    if not good:
        reasons = "; ".join(skipped.lines()) or "there is none"
        raise UserError(f"{asked.source}: no utterance could be imported: {reasons}")
    ordered = [good[identity] for identity in sorted(good)]
    kinds = _put(out, ordered)
    hours: dict[str, float] = defaultdict(float)
    for utterance, _ in ordered:
        hours[utterance.split] += utterance.duration_s / 3600
    by_split = ", ".join(f"{split} {hours[split]:.2f} h" for split in sorted(hours))
    by_kind = ", ".join(f"{kinds[kind]} {kind}" for kind in sorted(kinds))
    lines = [
        f"{out / MANIFEST}: {len(ordered)} utterances, {sum(hours.values()):.2f} h ({by_split})",
        f"{out / INSTRUCTIONS}: {kinds.total()} tasks ({by_kind})",
        *(f"left out: {line}" for line in skipped.lines()),
    ]
    return "\n".join(lines)


def _put(out: Path, ordered: Sequence[tuple[Utterance, Entry]]) -> Counter[str]:
    """Write both tables; returns how many tasks there are of each kind.

    Both are complete aside before either takes its place, and an old manifest goes first: whenever this is killed, a
    manifest that is there has the instructions beside it that belong to it.
    """
    kinds: Counter[str] = Counter()

    def utterances() -> Iterator[Row]:
        for utterance, _ in ordered:
            yield {name: getattr(utterance, name) for name in _MANIFEST_SCHEMA.names}

    def tasks() -> Iterator[Row]:
        for utterance, entry in ordered:
            for row in _tasks(utterance, entry):
                kinds[f"st-{row['target_lang']}" if row["task"] == "st" else row["task"]] += 1
                yield row

    def fill_instructions(aside: Path) -> None:
        _fill(aside, tasks(), _INSTRUCTIONS_SCHEMA)
        (out / MANIFEST).unlink(missing_ok=True)

    def fill_manifest(aside: Path) -> None:
        _fill(aside, utterances(), _MANIFEST_SCHEMA)
        files.write_whole(out / INSTRUCTIONS, fill_instructions)

    files.write_whole(out / MANIFEST, fill_manifest)
    return kinds


def _fill(aside: Path, rows: Iterator[Row], schema: Any) -> None:
    with pq.ParquetWriter(aside, schema) as writer:
        while block := list(islice(rows, 1 << 15)):
            writer.write_table(pa.Table.from_pylist(block, schema))


def measure(paths: Sequence[Path], workers: int) -> dict[Path, Measured]:
    """The header of every file, or why it has none: each file once, by a pool of threads."""
    distinct = list(dict.fromkeys(paths))
    every_s = 0.5 if sys.stderr.isatty() else 30.0
    found: dict[Path, Measured] = {}
    with (
        ThreadPoolExecutor(max(workers, 1)) as pool,
        tqdm(total=len(distinct), unit=" files", desc="measuring", mininterval=every_s, delay=2.0) as bar,
    ):
        for start in range(0, len(distinct), _BLOCK):
            block = distinct[start : start + _BLOCK]
            found.update(zip(block, pool.map(_header, block), strict=True))
            bar.update(len(block))
    return found


def _header(path: Path) -> Measured:
    try:
        return audio.info(path)
    except audio.BadAudio as error:
        return error


def _has_text(entry: Entry, skipped: Skipped) -> bool:
    if not entry.id.strip():
        skipped.add("empty_id", entry.where, "an utterance needs an id")
        return False
    if has := wrong_id(entry.id):
        skipped.add("bad_id", entry.where, f"the id {entry.id[:80]!r} has {has}")
        return False
    if not entry.text.strip():
        skipped.add("empty_text", entry.where, f"{entry.id!r} has no text")
        return False
    said = [entry.id, str(entry.audio), entry.text, entry.speaker, *(task.answer for task in entry.tasks)]
    try:
        "".join([*said, *(text for task in entry.tasks for text in task.variables.values())]).encode()
    except UnicodeEncodeError as error:
        skipped.add("not_utf8", entry.where, str(error))
        return False
    return True


def _segment(entry: Entry, header: Measured) -> tuple[float, float]:
    """Start and measured duration.

    Raises:
        BadAudio: the file is bad, or the segment is not in it.
    """
    if isinstance(header, audio.BadAudio):
        raise header
    if entry.one_channel and header.channels > 1:
        detail = f"{entry.audio} has {header.channels} channels, and one is meant; write each to a file of its own"
        raise audio.BadAudio("channels", detail)
    if not (entry.start_s >= 0 and math.isfinite(entry.start_s)):
        raise audio.BadAudio("bad_time", f"{entry.id!r} begins at {entry.start_s} s")
    left_s = header.duration_s - entry.start_s
    wanted_s = left_s if entry.duration_s is None else entry.duration_s
    if left_s <= 0 or wanted_s > left_s + audio.TOLERANCE_S:
        end_s = entry.start_s + max(wanted_s, 0.0)
        raise audio.BadAudio("truncated", f"{entry.audio} ends at {header.duration_s:.3f} s, before {end_s:.3f} s")
    if not (wanted_s > 0 and math.isfinite(wanted_s)):
        raise audio.BadAudio("bad_time", f"{entry.id!r} lasts {wanted_s} s")
    return entry.start_s, left_s if wanted_s > left_s - SNAP_S else wanted_s


class Places:
    """How audio is named in a manifest: relative to its folder if it lies below that folder's parent, else absolute.

    So a corpus and its manifest that stand side by side, or one in the other, can move together.
    """

    def __init__(self, out: Path, absolute: bool) -> None:
        self.out, self.absolute = Path(os.path.realpath(out)), absolute
        self._real = lru_cache(maxsize=1 << 16)(os.path.realpath)

    def of(self, path: Path) -> str:
        """The path for a manifest; links on the way to the file's folder are followed, the file's own is not."""
        real = Path(self._real(path.parent)) / path.name
        if self.absolute or not real.is_relative_to(self.out.parent):
            return str(real)
        return os.path.relpath(real, self.out)


def _speaker_pattern(pattern: str | None) -> Any:
    if pattern is None:
        return lambda identity: ""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"--speaker-from {pattern!r} is no regular expression: {error}") from None
    if compiled.groups != 1:
        raise UserError(
            f"--speaker-from {pattern!r} has {compiled.groups} groups; one must be the speaker, as ^([^-]+)-"
        )

    def speaker(identity: str) -> str:
        match = compiled.search(identity)
        return match.group(1) or "" if match else ""

    return speaker


def _tasks(utterance: Utterance, entry: Entry) -> list[Row]:
    rows: list[tuple[str, dict[str, str], str, str]] = [("asr", {}, utterance.lang or "en", utterance.text)]
    rows += [(task.task, task.variables, task.target_lang, task.answer) for task in entry.tasks]
    made = [
        {
            "utterance_id": utterance.id,
            "task": task,
            "variables": json.dumps(variables, ensure_ascii=False, sort_keys=True),
            "target_lang": lang,
            "answer": answer,
        }
        for task, variables, lang, answer in rows
    ]
    return list({tuple(row.values()): row for row in made}.values())
