"""Check every hash, number and id of a shard set, or encode some of it again.

    python -m tools.verify SET [--targets] [--manifest FILE] [--sample N --manifest FILE --encoder FOLDER] [--jobs J]

All problems are reported, one a line with what to do; the exit code is 2 if there is any.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sm_train.data import manifest, shards
from sm_train.data.manifest import manifest_hash
from sm_train.data.samples import FEATS
from sm_train.errors import MISTAKEN, UserError, run_command
from sm_train.records import Utterance
from tools.verify import MALFORMED, UTTERANCES, Problem, target_sets
from tools.verify.parts import Part, check_feats
from tools.verify.tables import Checked, check_manifest, check_parts, check_tables, read_dataset

_REMEDY = f"restore the file, or remove {shards.DATASET} and run the command that made the set again (its parts stay)"
_PART_REMEDY = f"restore it, or remove the part's folder and {shards.DATASET} and run precompute again"
_EVERY_S = 10.0


class Progress:
    """Parts done and MB/s: a line that rewrites itself on a terminal, one every 10 s elsewhere."""

    def __init__(self) -> None:
        self.begun = self._shown = time.monotonic()
        self.num_parts = self.num_bytes = 0

    def advance(self, part: Part) -> None:
        """Count a part."""
        self.num_parts += 1
        self.num_bytes += part.num_bytes
        now, live = time.monotonic(), sys.stderr.isatty()
        if now - self._shown > (0.2 if live else _EVERY_S):
            self._shown = now
            line = f"{self.num_parts} parts, {self.speed(self.num_bytes)}"
            print(f"\r{line}\x1b[K" if live else line, end="" if live else "\n", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the line."""
        if self._shown > self.begun and sys.stderr.isatty():
            print(file=sys.stderr)

    def speed(self, num_bytes: int) -> str:
        """So many bytes, and how fast."""
        elapsed_s = max(time.monotonic() - self.begun, 1e-6)
        return f"{num_bytes / 1e6:.1f} MB, {num_bytes / 1e6 / elapsed_s:.0f} MB/s"


def check_utterances(
    root: Path, inputs: Sequence[Utterance], source: str | None, jobs: int, progress: Progress
) -> Checked:
    """Check a shard set without its target sets.

    Args:
        inputs: the utterances of the manifest, if one is given: its path or address is ``source``.
    """
    found = Checked(root, _REMEDY)
    read_dataset(found)
    check_parts(found, FEATS, check_feats(_width(root, found)), jobs, progress.advance, _PART_REMEDY)
    if found.dataset:
        check_tables(found, UTTERANCES)
    if source:
        check_manifest(found, inputs, manifest_hash(inputs), source)
    return found


def _width(root: Path, found: Checked) -> Any:
    """The encoder's width: a fact of the parts, until there is a dataset.json."""
    if found.dataset:
        return found.dataset.get("width")
    for part in shards.parts_of(root):
        try:
            return shards.read_part(root, part)["facts"]["width"]
        except MALFORMED:
            continue
    return None


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m tools.verify", description=__doc__.splitlines()[0])
    parser.add_argument("shard_set", help="folder of a shard set")
    parser.add_argument("--targets", action="store_true", help="its target sets too")
    parser.add_argument(
        "--manifest", help="the manifest it was made of, or its address: inputs = committed + quarantined"
    )
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="encode units of N utterances again")
    parser.add_argument("--encoder", help="with --sample: folder or hub repository of the encoder's checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="with --sample: which units")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8), help="parts read side by side")
    asked = parser.parse_args(argv)
    root = _folder(asked.shard_set)
    if asked.sample and not (asked.manifest and asked.encoder):
        raise UserError("--sample encodes audio again: give --manifest and --encoder with it")
    inputs = manifest.read_manifest(asked.manifest) if asked.manifest else []
    progress, jobs = Progress(), max(asked.jobs, 1)
    found = check_utterances(root, inputs, asked.manifest, jobs, progress)
    checked = [found]
    for name in target_sets(root) if asked.targets else ():
        from tools.verify.targets import check_targets

        checked.append(check_targets(root, name, found.table, jobs, progress.advance))
    progress.end()
    problems = [problem for one in checked for problem in one.problems]
    num_rows, num_parts = sum(len(part.rows) for part in found.parts), sum(len(one.parts) for one in checked)
    read = progress.speed(sum(one.num_bytes for one in checked))
    print(f"{root}: {num_rows} utterances, {num_parts} parts, {read}", flush=True)
    if asked.sample and not problems:
        from tools.verify.reencode import encode_again

        compared = encode_again(root, found.dataset, inputs, asked.manifest, asked.encoder, asked.sample, asked.seed)
        print(compared, flush=True)
        problems = compared.problems
    elif asked.sample:
        print("nothing was encoded again: mend the set first", flush=True)
    _report(problems)


def _folder(place: str) -> Path:
    if "://" in place:
        raise UserError(f"{place}: folders only are verified; copy the set to a disk, or verify it where it lies")
    if not (Path(place) / shards.CONTRACT).exists() and not (Path(place) / shards.DATASET).exists():
        raise UserError(f"{place} is no shard set: it has no {shards.CONTRACT}")
    return Path(place)


def _report(problems: Sequence[Problem]) -> None:
    for problem in problems:
        print(problem, flush=True)
    if problems:
        print(f"{len(problems)} problems", flush=True)
        raise SystemExit(MISTAKEN)
    print("no problem found", flush=True)


if __name__ == "__main__":
    run_command(main)
