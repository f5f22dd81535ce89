"""What a stage trains on: items, and the micro-batches that some of them make.

Shape letters: B items, T frames, L tokens, E encoder width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from sm_train import files
from sm_train.data import shards
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

    def of_epoch(self, epoch: int) -> NDArray[np.int64] | None:
        """The items that an epoch goes through, equally many in every epoch; None for all, each once."""

    def collate(self, items: NDArray[np.int64], epoch: int) -> MicroBatch:
        """Read, verify and pad some items."""


class SpeechItems:
    """Utterances of some splits of a shard set, with their targets: what stage 1 trains on and is validated on.

    Raises:
        UserError: the set or its targets are not complete, or no utterance is in these splits.
    """

    unit = "frames"

    def __init__(self, shard_set: Path, targets: TargetSet, splits: Sequence[str]) -> None:
        self.splits = list(splits)
        self.dataset = files.read_json(shard_set / shards.DATASET)
        self.utterances = shards.read_table(shard_set, "utterances.parquet")
        self.feats = shards.Samples(shard_set, self.utterances)
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

    def of_epoch(self, epoch: int) -> None:
        """Every epoch goes through all."""

    def collate(self, items: NDArray[np.int64], epoch: int = 0) -> Batch:
        """Read, verify and pad some items; the same in every epoch."""
        feats = [self.feats[int(self.ordinals[i])]["feats"] for i in items]
        rows = [self.targets.rows_of(int(self.rows[i])) for i in items]
        feats_BTE = np.zeros((len(feats), max(map(len, feats)), feats[0].shape[1]), np.float16)
        rows_BL = np.full((len(rows), max(map(len, rows))), self.targets.pad_row, np.int64)
        for b, (feat_TE, row_L) in enumerate(zip(feats, rows, strict=True)):
            feats_BTE[b, : len(feat_TE)] = feat_TE
            rows_BL[b, : len(row_L)] = row_L
        return Batch(
            torch.from_numpy(feats_BTE),
            torch.tensor([len(feat) for feat in feats]),
            torch.from_numpy(rows_BL),
            torch.tensor([len(row) for row in rows]),
            self.ordinals[items],
        )
