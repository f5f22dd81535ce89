"""All that precompute writes, from an empty folder to a complete set: stopped after every call and gone on with."""

from __future__ import annotations

import itertools
import os
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from sm_train.data import mds, mds_writer, owner, processes, shards
from sm_train.encoding.decoders import Decoded
from sm_train.encoding.units import UnitEncoder
from sm_train.models.speech import EncoderConfig
from sm_train.precompute import PrecomputeConfig, run
from sm_train.records import Quarantined, Receipt, Unit, Utterance
from tests import builders
from tests.chaos import disk
from tests.chaos.disk import Disk, Tree


class Tones:
    """Stands for an encoder: some numbers that follow from the utterance's own alone."""

    width, frame_rate_hz, equal_length, shortest_samples = 3, 25.0, False, 160
    facts: ClassVar[dict[str, Any]] = {"encoder_hash": "tones"}
    longest_samples = None
    inputs = SimpleNamespace(prepare=lambda samples_S: samples_S)

    def encode(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [np.outer(np.arange(4), [len(x), x.sum(), 1]).astype(np.float32) for x in inputs]


class Names:
    """Stands for decoders: whose audio is called ``bad`` cannot be decoded, unless all audio was mended."""

    def __init__(self, mended: bool) -> None:
        self.mended = mended

    def submit(self, utterance: Utterance) -> Future[Decoded | Quarantined]:
        done: Future[Decoded | Quarantined] = Future()
        is_bad = utterance.audio == "bad" and not self.mended
        good = Decoded(np.full(160, len(utterance.id), np.float32), 160)
        done.set_result(Quarantined(utterance.id, "undecodable", "-") if is_bad else good)
        return done

    def close(self, abandon: bool = False) -> None: ...


def spread(cfg: PrecomputeConfig, units: Sequence[Unit], mended: bool = False) -> Generator[Receipt, None, None]:
    """Encode units one after the other, in this process and without a model; audio is mended before a requeue."""
    encoder = UnitEncoder(
        Tones(), Names(cfg.requeue or mended), Path(cfg.out), cfg.batch_s, cfg.max_duration_s, 1 << 30
    )  # type: ignore[arg-type]
    try:
        for unit in units:
            yield encoder.encode_unit(unit)
    finally:
        encoder.close()


def job(folder: Path, out: Path, **changes: Any) -> PrecomputeConfig:
    """A set of eight parts of up to three shards: some with a bad row, one of bad rows alone."""
    bad = (1, 3, 4, 5, 17, 20)
    rows = [builders.row(f"utt-{i:02}", "bad" if i in bad else "good", 1.0, "a text") for i in range(24)]
    manifest = folder / "manifest.jsonl"
    if not manifest.exists():
        builders.write_manifest(manifest, rows)
    settings: dict[str, Any] = {"unit_utterances": 3, "max_quarantined_share": 0.9, "log": "none", **changes}
    return PrecomputeConfig(str(manifest), str(out), EncoderConfig(path="tones"), **settings)


def new(folder: Path, root: Path) -> dict[str, Any]:
    """An empty folder, and what the job asks beside."""
    return {}


def quarantined(folder: Path, root: Path) -> dict[str, Any]:
    """A complete set, some of whose rows are run again."""
    run(job(folder, root), spread)
    return {"requeue": True}


@dataclass
class States:
    """All different folders that stops may leave."""

    thorough: bool
    found: list[tuple[str, str, Tree]] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    disk: Disk | None = None
    _seen: set[Any] = field(default_factory=set)

    def at_change(self, call: str) -> None:
        """Keep what a stop right after a call may leave."""
        assert self.disk is not None
        self.calls[call.split()[0]] += 1
        kinds = [("death", self.disk.after_death()), ("power", self.disk.after_power_loss(self.thorough))]
        for kind, tree in itertools.chain.from_iterable(((k, tree) for tree in trees) for k, trees in kinds):
            key = frozenset(tree.items())
            if key not in self._seen:
                self._seen.add(key)
                self.found.append((call, kind, tree))


def stops(root: Path, work: Callable[[], object], patch: pytest.MonkeyPatch, thorough: bool) -> States:
    """Do the work on a set's folder, and collect what stops would leave."""
    found = States(thorough)
    found.disk = follower = Disk(root, found.at_change)
    with patch.context() as context:
        _be_a_driver(context)
        context.setattr(processes, "own", lambda: f"1-0-{processes._machine()}")  # one that has ended since
        follower.follow(context)
        work()
    return found


def _be_a_driver(patch: pytest.MonkeyPatch) -> None:
    """Hold leases without a heartbeat, whose moment would be chance; a damaged lease is not waited for."""
    patch.setattr(owner.Lease, "_keep", lambda lease: None)
    patch.setattr(owner, "BEAT_S", 0.0)


def contents(root: Path) -> dict[str, bytes]:
    """Every file of a set, unfinished and hidden ones included, but for a lease that was being given back."""
    found = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith(".aside-removed-.owner-")}


def all_recovered(
    folder: Path, begin: Callable[[Path, Path], dict[str, Any]], patch: pytest.MonkeyPatch, thorough: bool
) -> States:
    """Stop the job after every call it makes, in every way, and run it again; AssertionError where that fails.

    Args:
        begin: makes what the set's folder holds before, and says what the job's config asks beside.
        thorough: see :meth:`Disk.after_power_loss`.
    """
    patch.setattr(mds_writer, "SHARD_BYTES", 64)  # a shard a sample
    root = folder / "set"
    root.mkdir()
    asked = begin(folder, root)
    before = contents(root)
    found = stops(root, lambda: run(job(folder, root, **asked), spread), patch, thorough)
    expected = contents(root)
    assert expected != before
    other = os.getpid() + 1
    with patch.context() as context:  # the one that goes on is another process, and its disk is fast
        _be_a_driver(context)
        context.setattr(os, "getpid", lambda: other)
        context.setattr(os, "fsync", lambda handle: None)
        for number, (call, kind, tree) in enumerate(found.found):
            put = folder / str(number)
            try:
                disk.put(tree, put)
                whole_or_absent(put)
                run(job(folder, put, **asked), spread)
                assert contents(put) == expected
            except BaseException as error:
                error.add_note(f"stopped after {call!r} ({kind}) with {sorted(tree)}")
                raise
            shutil.rmtree(put)
    return found


def whole_or_absent(root: Path) -> None:
    """What carries a name is what was committed under it."""
    for part in shards.parts_of(root):
        if shards.is_committed(root, part):
            for name, digest in shards.read_part(root, part)["files"].items():
                assert mds.file_digest(root / part / name) == digest
    if shards.is_complete(root):
        shards.read_table(root, "utterances.parquet")
        shards.read_table(root, shards.QUARANTINE)
