"""What a stage trains on: items, and the micro-batches that some of them make.

Shape letters: B items, T frames, L tokens, E encoder width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from sm_train import files
from sm_train.data import shards
from sm_train.data.mirror import Mirror
from sm_train.data.samples import FEATS, Samples
from sm_train.data.target_set import TargetSet
from sm_train.errors import UserError
from sm_train.records import Batch, MicroBatch

Columns = Mapping[str, NDArray[np.int64]]


class Items(Protocol):
    """What a stage trains on: an item is a row of its plan."""

    columns: Columns
    """What an objective counts by [N each]."""
    lengths: NDArray[np.int64]
    """What each item costs of a micro-batch's budget [N]."""
    unit: str
    """What lengths are counted in, as the budget's key is called: frames, tokens, samples."""
    ids: list[str]
    duration_s: NDArray[np.float64]

    @property
    def shard_of(self) -> NDArray[np.int64] | None:
        """For shards that are far away, the number of the one that each item lies in [N]; None where all are near."""

    def of_epoch(self, epoch: int) -> NDArray[np.int64] | None:
        """The items that an epoch goes through, equally many in every epoch; None for all, each once."""

    def collate(self, items: NDArray[np.int64], epoch: int, buffer: Buffer | None = None) -> MicroBatch:
        """Read, verify and pad some items; features lie in ``buffer`` until it is used again."""


class Buffer:
    """Memory for the features of one micro-batch after another: what is freed and allocated anew costs a page fault a
    page, more than reading does. Pinned where there is a GPU.
    """

    def __init__(self) -> None:
        self._flat = torch.empty(0, dtype=torch.float16)

    def take(self, shape: tuple[int, int, int]) -> torch.Tensor:
        """A float16 tensor of this shape with anything in it; the one before is void."""
        size = math.prod(shape)
        if size > len(self._flat):
            self._flat = torch.empty(size, dtype=torch.float16, pin_memory=torch.cuda.is_available())
        return self._flat[:size].view(shape)


class SpeechItems:
    """Utterances of some splits of a shard set, with their targets: what stage 1 trains on and is validated on.

    Raises:
        UserError: the set or its targets are not complete, or no utterance is in these splits.

    Args:
        mirror: fetches feature shards that are not in ``shard_set`` yet; None for a local set.
    """

    unit = "frames"

    def __init__(
        self, shard_set: Path, targets: TargetSet, splits: Sequence[str], mirror: Mirror | None = None
    ) -> None:
        self.splits = list(splits)
        self.dataset = files.read_json(shard_set / shards.DATASET)
        self.utterances = shards.read_table(shard_set, "utterances.parquet")
        self.feats = Samples(shard_set, self.utterances, FEATS, mirror)
        self.targets = targets
        of_row = targets.table.column("utterance").to_numpy()
        split_of = np.array(self.utterances.column("split").to_pylist())[of_row]
        self.rows = np.flatnonzero(np.isin(split_of, list(splits)))
        if missing := sorted(set(splits) - set(split_of[self.rows].tolist())):
            have = ", ".join(sorted(set(split_of.tolist())))
            raise UserError(f"shard set {shard_set} has no utterance in split {', '.join(missing)!r}; it has: {have}")
        self.ordinals = of_row[self.rows]
        num_frames = self.utterances.column("num_frames").to_numpy()[self.ordinals]
        num_tokens = targets.table.column("num_tokens").to_numpy()[self.rows]
        self.columns: Columns = {"num_frames": num_frames.astype(np.int64), "num_tokens": num_tokens.astype(np.int64)}
        self.lengths = self.columns["num_frames"]
        self.duration_s = self.utterances.column("duration_s").to_numpy()[self.ordinals]
        self.feature_width = int(self.feats[int(self.ordinals[0])]["feats"].shape[1])
        ids = self.utterances.column("id").to_pylist()
        self.ids = [ids[o] for o in self.ordinals]

    def __len__(self) -> int:
        return len(self.rows)

    def of_splits(self, splits: Sequence[str]) -> SpeechItems:
        """Utterances of other splits of the same set."""
        return SpeechItems(self.feats.root, self.targets, splits, self.feats.mirror)

    def of_epoch(self, epoch: int) -> None:
        """Every epoch goes through all."""

    @property
    def shard_of(self) -> NDArray[np.int64] | None:
        """For a mirrored set, the number of the shard that each item lies in [N]; None for a local one."""
        return self.feats.shard_numbers()[self.ordinals] if self.feats.mirror else None

    def fill(self, padded_BTE: NDArray[np.float16], places: NDArray[np.int64], items: NDArray[np.int64]) -> None:
        """Read and verify the features of some items into these places of a micro-batch, zeros behind them."""
        for n in np.argsort(self.ordinals[items]):  # in the order of the files
            frames = int(self.lengths[items[n]])
            self.feats.read_into(int(self.ordinals[items[n]]), "feats", padded_BTE[places[n], :frames])
            padded_BTE[places[n], frames:] = 0

    def collate(self, items: NDArray[np.int64], epoch: int = 0, buffer: Buffer | None = None) -> Batch:
        """Read, verify and pad some items; the same in every epoch."""
        rows = [self.targets.rows_of(int(self.rows[i])) for i in items]
        frames = self.lengths[items].tolist()
        feats_BTE = (buffer or Buffer()).take((len(frames), max(frames), self.feature_width))
        self.fill(feats_BTE.numpy(), np.arange(len(items)), items)
        rows_BL = np.full((len(rows), max(map(len, rows))), self.targets.pad_row, np.int64)
        for b, row_L in enumerate(rows):
            rows_BL[b, : len(row_L)] = row_L
        return Batch(
            feats_BTE,
            torch.tensor(frames),
            torch.from_numpy(rows_BL),
            torch.tensor([len(row) for row in rows]),
            self.ordinals[items],
        )
