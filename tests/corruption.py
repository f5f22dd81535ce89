"""Random damage to a shard set with targets, and what becomes of each: found, healed, or in bytes that nobody uses.

Shape letters: T frames, L tokens, E feature width, R rows of the table, D target width.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from sm_train.data import shards
from sm_train.data.batches import SpeechItems
from sm_train.data.hashing import tensors_hash
from sm_train.data.mds import Shard
from sm_train.data.mirror import locate
from sm_train.data.samples import FEATS, TOKENS
from sm_train.data.target_set import EMBEDDING, TABLE, UTTERANCES, TargetSet, cover
from sm_train.errors import UserError

PARTS, OF_PART, E = 3, 6, 12
FRAMES = (5, 9, 9, 14, 14, 30)  # of each part's utterances: files of equal length, and samples of equal length
TARGET = "t"
Rng = np.random.Generator


def make_set(root: Path, seed: int) -> Path:
    """A complete set; every seed gives files of the same lengths with other values."""
    rng = np.random.default_rng(seed)
    parts = [f"part-{number:07d}" for number in range(PARTS)]
    target = root / "targets" / TARGET
    for number, part in enumerate(parts):
        ids = [f"utt-{number}-{i}" for i in range(OF_PART)]
        feats = [rng.normal(size=(frames, E)).astype(np.float16) for frames in FRAMES]
        tokens = [rng.integers(0, 20, size=1 + frames // 5).astype(np.int32) for frames in FRAMES]
        spoken = [{"id": i, "feats": feats_TE} for i, feats_TE in zip(ids, feats, strict=True)]
        rows = [
            {"id": i, "split": "train", "duration_s": frames / 25, "num_frames": frames, "text": i}
            for i, frames in zip(ids, FRAMES, strict=True)
        ]
        shards.write_part(root, part, FEATS, spoken, rows, [], {})
        written = [{"id": i, "tokens": tokens_L} for i, tokens_L in zip(ids, tokens, strict=True)]
        of_tokens = [
            {"id": i, "utterance": number * OF_PART + k, "num_tokens": len(tokens[k])} for k, i in enumerate(ids)
        ]
        shards.write_part(target, part, TOKENS, written, of_tokens, [], {})
    shards.commit(root, parts, {}, "utterances.parquet")
    tensors = {"ids": torch.arange(20, dtype=torch.int32), "rows": torch.from_numpy(rng.normal(size=(20, 8))).float()}
    save_file(tensors, target / EMBEDDING)
    contract = {
        "covers": cover(root, shards.read_table(root, UTTERANCES)),
        "embedding_hash": tensors_hash(tensors),
        "pad_id": 0,
    }
    shards.commit(target, parts, contract, TABLE)
    return root


def flip(data: bytes, rng: Rng, end: int | None = None) -> bytes:
    """One to three bits turned, among the first ``end`` bytes."""
    made = bytearray(data)
    for at in rng.choice(end or len(data), size=int(rng.integers(1, 4)), replace=False):
        made[at] ^= 1 << int(rng.integers(8))
    return bytes(made)


def truncate(data: bytes, rng: Rng) -> bytes:
    """Cut short anywhere, or to nothing."""
    return data[: int(rng.integers(len(data)))]


def _error_of(use: Callable[[], object]) -> str | None:
    """What the UserError says that this raises; None if it raises none."""
    try:
        use()
    except UserError as error:
        return str(error)
    return None


def _close(items: SpeechItems) -> None:
    items.feats.close()
    items.targets.samples.close()


class Campaign:
    """Sets to be damaged, opened once: ``run`` damages a file, reads all samples, and puts the file right again."""

    def __init__(self, folder: Path) -> None:
        self.root, self.old = make_set(folder / "set", 0), make_set(folder / "old", 1)
        self.cache = folder / "cache"
        self.items = self._items(self.root)
        self._mirror: SpeechItems | None = None
        self.truth = self.values(self.items)
        self.found: Counter[tuple[str, str]] = Counter()

    def _items(self, root: Path, cache: Path | None = None) -> SpeechItems:
        local, mirror = locate(str(root), TARGET, str(cache) if cache else None, 1.0)
        return SpeechItems(local, TargetSet(local, TARGET), ["train"], mirror)

    @staticmethod
    def values(items: SpeechItems) -> list[tuple[bytes, bytes]]:
        """Features and token rows of every item, as a training step gets them."""
        batches = [items.collate(np.array([i])) for i in range(len(items))]
        return [(batch.feats_BTE.numpy().tobytes(), batch.token_rows_BL.numpy().tobytes()) for batch in batches]

    def check_reads(self, kind: str, items: SpeechItems, path: Path | None) -> None:
        """Every item is exactly right or an error that names file (one of the damaged folder's) and utterance."""
        errors, seen = 0, []
        _close(items)
        for i, identity in enumerate(items.ids):
            said = _error_of(lambda i=i: seen.append(items.collate(np.array([i]))))
            if said is None:
                batch = seen.pop()
                got = (batch.feats_BTE.numpy().tobytes(), batch.token_rows_BL.numpy().tobytes())
                assert got == self.truth[i], f"{kind}: {identity} is wrong and nobody noticed"
                continue
            errors += 1
            assert path is not None, f"{kind}: not healed: {said}"
            assert repr(identity) in said, f"{kind}: {said} does not name {identity}"
            assert str(path) in said, f"{kind}: {said} does not name {path}"
        self.found[kind, "found" if errors else "healed" if path is None else "in bytes that nobody uses"] += 1

    def damaged_file(self, kind: str, path: Path, damage: Callable[[bytes], bytes]) -> None:
        """Samples of a local set."""
        whole = path.read_bytes()
        path.write_bytes(damage(whole))
        try:
            self.check_reads(kind, self.items, path)
        finally:
            path.write_bytes(whole)

    def refused_file(self, kind: str, path: Path, damage: Callable[[bytes], bytes], use: Callable[[], object]) -> None:
        """A table or an embedding: never used unless it is exactly what was committed."""
        whole = path.read_bytes()
        path.write_bytes(damage(whole))
        said = _error_of(use)
        path.write_bytes(whole)
        assert said is not None, f"{kind}: a damaged {path.name} was used"
        assert str(path) in said, f"{kind}: {said} does not name {path}"
        self.found[kind, "found"] += 1

    def run(self, kind: str, rng: Rng) -> None:
        """One random corruption of a kind."""
        one, other = rng.choice(PARTS, size=2, replace=False)
        features = [self.root / f"part-{part:07d}/shard.00000.mds" for part in (one, other)]
        tokens = [self.root / f"targets/{TARGET}/part-{part:07d}/shard.00000.mds" for part in (one, other)]
        path = tokens[0] if kind.startswith("token") else features[0]
        match kind:
            case "feature shard, bits" | "token shard, bits":
                self.damaged_file(kind, path, lambda data: flip(data, rng))
            case "feature shard, bits of its head":
                with Shard(path) as shard:
                    head = int(shard.offsets[0])
                self.damaged_file(kind, path, lambda data: flip(data, rng, head))
            case "feature shard, cut short" | "token shard, cut short":
                self.damaged_file(kind, path, lambda data: truncate(data, rng))
            case "feature shard, another of its length":
                self.damaged_file(kind, path, lambda _: features[1].read_bytes())
            case "token shard, another of its length":
                self.damaged_file(kind, path, lambda _: tokens[1].read_bytes())
            case "feature shard, samples swapped":
                self.damaged_file(kind, path, lambda data: self._swapped(path, data, rng))
            case "table":
                name = str(rng.choice(["utterances.parquet", f"targets/{TARGET}/{TABLE}"]))
                table = self.root / name
                change = truncate if rng.integers(4) == 0 else flip
                use = lambda: shards.read_table(table.parent, table.name)  # noqa: E731
                self.refused_file(kind, table, lambda data: change(data, rng), use)
            case "embedding":
                change = truncate if rng.integers(4) == 0 else flip
                target = self.root / "targets" / TARGET
                use = lambda: TargetSet(self.root, TARGET)  # noqa: E731
                self.refused_file(kind, target / EMBEDDING, lambda data: change(data, rng), use)
            case "mirror, damaged while in use":
                self._mirrored(kind, rng, int(one), restart=False)
            case "mirror, stale or damaged after a restart":
                self._mirrored(kind, rng, int(one), restart=True)
            case _:
                raise AssertionError(kind)

    @staticmethod
    def _swapped(path: Path, data: bytes, rng: Rng) -> bytes:
        with Shard(path) as shard:
            a, b = ((1, 2), (3, 4))[int(rng.integers(2))]
            spans = [slice(int(shard.offsets[i]), int(shard.offsets[i + 1])) for i in (a, b)]
        made = bytearray(data)
        made[spans[0]], made[spans[1]] = data[spans[1]], data[spans[0]]
        return bytes(made)

    def _mirrored(self, kind: str, rng: Rng, part: int, *, restart: bool) -> None:
        """A copy in the cache is damaged, or is the old set's: it must be healed, to exactly the committed bytes."""
        if self._mirror is None:
            self._mirror = self._items(self.root, self.cache)
            self.values(self._mirror)
        path = self._mirror.feats.root / f"part-{part:07d}/shard.00000.mds"
        stale = (self.old / f"part-{part:07d}/shard.00000.mds").read_bytes()
        whole = path.read_bytes()
        choice = int(rng.integers(3))
        path.write_bytes(stale if choice == 0 else truncate(whole, rng) if choice == 1 else flip(whole, rng))
        if restart:
            if rng.integers(2):  # the small files too
                small = [p for p in self._mirror.feats.root.rglob("*") if p.is_file() and ".mirror" not in p.name]
                hit = small[int(rng.integers(len(small)))]
                if hit.parent.parent != self._mirror.feats.root:  # but for feature shards: one of them is damaged now
                    hit.write_bytes(flip(hit.read_bytes(), rng))
            _close(self._mirror)
            self._mirror = self._items(self.root, self.cache)
        self.check_reads(kind, self._mirror, None)

    def close(self) -> None:
        """Give handles and the cache back."""
        for items in (self.items, self._mirror):
            if items is not None:
                _close(items)
        shutil.rmtree(self.cache, ignore_errors=True)


def run_all(folder: Path, counts: Mapping[str, int], seed: int) -> Counter[tuple[str, str]]:
    """So many corruptions of each kind; what became of them by (kind, outcome)."""
    campaign, rng = Campaign(folder), np.random.default_rng(seed)
    handles = len(os.listdir("/proc/self/fd"))
    for kind, count in counts.items():
        for _ in range(count):
            campaign.run(kind, rng)
    assert campaign.values(campaign.items) == campaign.truth
    campaign.close()
    assert len(os.listdir("/proc/self/fd")) <= handles  # not one is left open
    return campaign.found
