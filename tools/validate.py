"""What precompute and tuning would refuse or leave out of a manifest and its instructions, before they run.

    python -m tools.validate MANIFEST [--instructions FILE] [--json] [--max-duration-s 60] [--workers N]

Both may be addresses (s3://bucket/manifest.parquet). Rows are streamed, audio headers read by a pool of threads; no
audio is decoded, so silence and NaN samples are found by precompute alone, and so is what is wrong with audio at an
address, of which nothing is read. Exit code 0: every row that was read would be committed; 2: some would be refused or
quarantined.
"""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from statistics import median
from typing import NamedTuple

from sm_train.data import audio, manifest
from sm_train.data.store import Absent
from sm_train.errors import MISTAKEN, UserError, run_command
from sm_train.prompts import LANGUAGES
from sm_train.records import Utterance
from tools.findings import UNREAD, Report

RATE_FACTOR, RATE_ROWS = 4.0, 20
"""Characters a second beyond this factor of a language's median are odd, where it has so many rows."""
_BLOCK = 2048
_SHORTEST_SAMPLES = 2480  # what makes one position behind SeamlessM4T's encoder and a mean over 2 frames


def validate(path: Path | str, instructions: Path | str | None, max_duration_s: float, workers: int) -> Report:
    """Check a manifest, and instructions on it.

    Raises:
        UserError: there is no such file.
    """
    for one in (path, instructions):
        if one is not None and "://" not in str(one) and not Path(one).is_file():
            raise UserError(f"file {one} does not exist")
    report, ids = Report(), dict[str, int]()
    rows = _rows(path, ids, report)
    root = manifest.root_of(path)
    info = lru_cache(maxsize=1 << 16)(_info)
    seen = Seen(report)
    with ThreadPoolExecutor(workers) as pool:
        while block := list(islice(rows, _BLOCK)):
            headers = pool.map(info, [audio.place_of(utterance.audio, root) for _, utterance in block])
            for (row, utterance), header in zip(block, headers, strict=True):
                check(report, row, utterance, header, max_duration_s)
                seen.add(row, utterance, header)
    seen.finish()
    if not ids and not report.findings:
        report.add("refused", "empty_manifest", 0, f"{path} holds no utterance")
    if instructions:
        check_instructions(report, instructions, ids)
    return report


class Remote(NamedTuple):
    """Audio at an address, which is not read."""

    address: str


Found = audio.Header | audio.BadAudio | Remote


def _info(place: Path | str) -> Found:
    if isinstance(place, str):
        return Remote(place)
    try:
        return audio.info(place)
    except audio.BadAudio as error:
        return error


def _rows(path: Path | str, ids: dict[str, int], report: Report) -> Iterator[tuple[int, Utterance]]:
    """The rows that a manifest's reader would take; the others are refused."""
    row = 0
    try:
        raw = manifest.read_rows(path, manifest.MANIFEST_COLUMNS, manifest.MANIFEST_DEFAULTS)
        for row, cells in enumerate(raw, start=1):
            try:
                yield row, manifest.check_row(cells, row, ids)
            except manifest.BadRow as error:
                whose = f"id {error.id!r}: " if error.id else ""
                report.add("refused", error.reason, row, f"{whose}{error}")
    except Absent:
        raise
    except UserError as error:
        report.add("refused", "unreadable", row + 1, str(error))


def check(report: Report, row: int, u: Utterance, header: Found, max_duration_s: float) -> None:
    """What precompute would say of a row, in its order and its words, and what only looks odd."""
    if not u.text.strip():
        report.add("quarantined", "empty_text", row, f"id {u.id!r}")
    elif u.duration_s > max_duration_s:
        report.add("quarantined", "too_long", row, f"id {u.id!r}: {u.duration_s:.2f} s, above {max_duration_s:g}")
    elif isinstance(header, audio.BadAudio):
        report.add("quarantined", header.reason, row, str(header))
    elif isinstance(header, audio.Header) and u.start_s + u.duration_s > header.duration_s + audio.TOLERANCE_S:
        wanted_s = u.start_s + u.duration_s
        report.add("quarantined", "truncated", row, f"{u.audio} has {header.duration_s:.3f} s of {wanted_s:.3f} s")
    elif _there_s(u, header) * audio.SAMPLE_RATE_HZ < _SHORTEST_SAMPLES:
        report.add("quarantined", "too_short", row, f"id {u.id!r}: {u.duration_s:.3f} s make no position")
    if isinstance(header, audio.Header):
        if header.sample_rate_hz != audio.SAMPLE_RATE_HZ:
            report.add("noted", "sample_rate", row, f"{header.sample_rate_hz} Hz, which precompute resamples")
        if header.channels > 1:
            report.add("noted", "channels", row, f"{header.channels} channels, which precompute mixes")
    elif isinstance(header, Remote):
        report.add("noted", UNREAD, row, f"{header.address}: at an address, of which no header is read")


def _there_s(u: Utterance, header: audio.Header | Remote) -> float:
    """Seconds of an utterance that its file has, as far as that is known."""
    return min(u.duration_s, header.duration_s - u.start_s) if isinstance(header, audio.Header) else u.duration_s


class Seen:
    """What is only seen over all rows: duplicates, odd rates of speech, hours."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.segments: dict[tuple[str, float], int] = {}
        self.said: dict[bytes, int] = {}
        self.files: dict[str, tuple[int, int, float, float]] = {}
        self.rates: dict[str, list[tuple[float, int]]] = defaultdict(list)
        self.hours: dict[str, float] = defaultdict(float)
        self.langs: Counter[str] = Counter()
        self.speakers: set[str] = set()
        self.count = 0

    def add(self, row: int, u: Utterance, header: Found) -> None:
        """Take in a row."""
        self.count += 1
        self.hours[u.split] += u.duration_s / 3600
        self.langs[u.lang] += 1
        self.speakers.add(u.speaker)
        first = self.segments.setdefault((u.audio, u.start_s), row)
        if first != row:
            self.report.add("noted", "same_audio", row, f"{u.audio} from {u.start_s:g} s is in row {first} already")
        text = " ".join(u.text.split())
        first = self.said.setdefault(
            blake2b(f"{u.speaker}\0{text}".encode(errors="replace"), digest_size=8).digest(), row
        )
        if first != row and text:
            self.report.add("noted", "same_text", row, f"speaker {u.speaker!r} says the text of row {first} again")
        if text:
            self.rates[u.lang].append((len(text) / u.duration_s, row))
        if isinstance(header, audio.Header):
            times = self.files.get(u.audio, (0, row, 0.0, 0.0))[0] + 1
            self.files[u.audio] = (times, row, u.start_s + u.duration_s, header.duration_s)

    def finish(self) -> None:
        """What follows from all rows."""
        for times, row, end_s, duration_s in self.files.values():
            if times == 1 and end_s < duration_s - audio.TOLERANCE_S:
                detail = f"{end_s:.3f} s of the file's {duration_s:.3f} s, and no other row has the rest"
                self.report.add("noted", "rest_unused", row, detail)
        for lang, rates in self.rates.items():
            middle = median(rate for rate, _ in rates)
            for rate, row in rates if len(rates) >= RATE_ROWS else ():
                if not middle / RATE_FACTOR <= rate <= middle * RATE_FACTOR:
                    detail = f"{rate:.1f} characters a second, the median of {lang or 'all'} is {middle:.1f}"
                    self.report.add("noted", "odd_rate", row, detail)
        self.report.facts = {
            "utterances": self.count,
            "hours": dict(sorted(self.hours.items())),
            "languages": dict(sorted(self.langs.items())),
            "speakers": len(self.speakers - {""}),
        }


def check_instructions(report: Report, path: Path | str, ids: dict[str, int]) -> None:
    """What cluster.retarget and tuning would say of instructions."""
    tasks: Counter[str] = Counter()
    seen: set[bytes] = set()
    row = 0
    try:
        raw = manifest.read_rows(path, manifest.INSTRUCTION_COLUMNS, manifest.INSTRUCTION_DEFAULTS)
        for row, cells in enumerate(raw, start=1):
            try:
                task = manifest.to_task(cells, f"{path}, row {row}")
            except UserError as error:
                report.add("refused", "bad_instruction", row, str(error))
                continue
            tasks[f"st-{task.target_lang}" if task.task == "st" else task.task] += 1
            if task.utterance_id not in ids:
                report.add("refused", "unknown_utterance", row, f"{task.utterance_id!r} is not in the manifest")
            digest = blake2b(repr(task).encode(errors="replace"), digest_size=16).digest()
            if digest in seen:
                report.add(
                    "refused", "duplicate_instruction", row, f"{task.utterance_id!r}: the same task is there twice"
                )
            seen.add(digest)
            if task.task == "st" and task.target_lang not in LANGUAGES and "target_language" not in task.variables:
                detail = f"{task.target_lang!r} has no name that a prompt could say; give a code as fr"
                report.add("refused", "unknown_language", row, detail)
    except Absent:
        raise
    except UserError as error:
        report.add("refused", "unreadable_instructions", row + 1, str(error))
    report.facts["instructions"] = dict(sorted(tasks.items()))


def main(argv: list[str]) -> None:
    parser = ArgumentParser("python -m tools.validate", description=__doc__.splitlines()[0])
    parser.add_argument("manifest", help="Parquet or JSONL manifest, or its address")
    parser.add_argument("--instructions", help="Parquet or JSONL instructions on it, or their address")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--max-duration-s", type=float, default=60.0, help="precompute's key of that name (60)")
    workers = min(32, 4 * (os.cpu_count() or 1))
    parser.add_argument("--workers", type=int, default=workers, help="threads that read audio headers")
    asked = parser.parse_args(argv)
    report = validate(asked.manifest, asked.instructions, asked.max_duration_s, max(asked.workers, 1))
    print(json.dumps(report.as_mapping(), ensure_ascii=False, indent=1) if asked.json else report, flush=True)
    if not report.ok:
        raise SystemExit(MISTAKEN)


if __name__ == "__main__":
    run_command(main)
