"""Where stage 1 takes its utterances from: one shard set, or several, mixed by weight.

A weight is a share of the padded frames. Every set runs through permutations of its own, so that no utterance comes
again before its set is through; the micro-batches hold utterances of all sets. The sets share one table of targets.

Shape letters: B items, T frames, L tokens, E encoder width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from sm_train import files
from sm_train.data import plan, shards
from sm_train.data.batches import Buffer, Columns, SpeechItems
from sm_train.data.mirror import Mirror, locate
from sm_train.data.target_set import TargetSet, TargetTable, join
from sm_train.errors import UserError
from sm_train.records import Batch

FROZEN_ENCODER = ("encoder", "encoder_revision", "encoder_hash", "layer", "pool")


def check_weights(where: Any) -> None:
    """Raises ValueError unless ``where`` is a folder, or a mapping of folders to weights above 0."""
    if isinstance(where, str):
        return
    if not isinstance(where, Mapping) or not where:
        raise ValueError(f"shards is {where!r}; it must be a folder, or a mapping {{folder: weight}}")
    for folder, weight in where.items():
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not 0 < weight < math.inf:
            raise ValueError(f"the weight of {folder} in shards is {weight!r}; it must be a number above 0")


class MixedItems:
    """Utterances of several shard sets as one row of items, set after set.

    Args:
        sets: utterances of each set.
        weights: each set's share of the padded frames, relative to the others'.
        targets: the table that holds all their targets.
        seed: of the order in which each set is gone through.
    """

    unit = "frames"

    def __init__(
        self, sets: Sequence[SpeechItems], weights: Sequence[float], targets: TargetTable, seed: int = 0
    ) -> None:
        self.sets, self.targets, self.seed = list(sets), targets, seed
        self.weights = [float(weight) / float(sum(weights)) for weight in weights]
        self.columns: Columns = {name: np.concatenate([one.columns[name] for one in sets]) for name in sets[0].columns}
        self.lengths = self.columns["num_frames"]
        self.duration_s = np.concatenate([one.duration_s for one in sets])
        self.ids = [name for one in sets for name in one.ids]
        self.feature_width = sets[0].feature_width
        self.utterances = pa.concat_tables([one.utterances.select(["text"]) for one in sets])
        self.dataset: dict[str, Any] = {
            **{name: sets[0].dataset[name] for name in FROZEN_ENCODER},
            "part_hashes": [[one.dataset["part_hashes"], w] for one, w in zip(sets, self.weights, strict=True)],
        }
        """What the features come from; ``part_hashes`` has each set's, and its weight."""
        self._first = np.cumsum([0, *map(len, sets)])
        self._first_ordinal = np.cumsum([0, *(len(one.utterances) for one in sets)])
        self._rows_of = [np.searchsorted(targets.token_ids, one.targets.token_ids) for one in sets]
        self._groups = [np.arange(a, b) for a, b in zip(self._first[:-1], self._first[1:], strict=True)]
        self._item_weights = [w / float(one.lengths.mean()) for w, one in zip(self.weights, sets, strict=True)]
        self._epoch_items = 0.0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch_steps(self, steps: int, budget: int, lanes: int, window: int) -> None:
        """Let an epoch take about so many steps of ``lanes`` micro-batches; 0: the scarcest set once."""
        if not steps:
            self._epoch_items = 0.0
            return
        # What a step holds is taken from a plan of all utterances; the mixture may fill it a little otherwise.
        of_step = (
            float(self.lengths.sum()) / plan.plan_epoch(self.lengths, self.seed, 0, budget, lanes, window).num_steps
        )
        mean = sum(self.weights) / sum(self._item_weights)
        self._epoch_items = steps * of_step / mean

    def of_epoch(self, epoch: int) -> NDArray[np.int64]:
        """The items of an epoch, the sets' frames in the shares of the weights."""
        return plan.mix(self._groups, self._item_weights, self.seed, epoch, self._epoch_items)

    @property
    def shard_of(self) -> NDArray[np.int64] | None:
        """The shard that each item lies in [N], counted through the sets; None if every set is near."""
        found = [one.shard_of for one in self.sets]
        if all(one is None for one in found):
            return None
        parts, first = [], 0
        for one, shard_of in zip(self.sets, found, strict=True):
            part = np.zeros(len(one), np.int64) if shard_of is None else shard_of
            parts.append(part + first)
            first += int(part.max()) + 1
        numbers: NDArray[np.int64] = np.concatenate(parts)
        return numbers

    def collate(self, items: NDArray[np.int64], epoch: int = 0, buffer: Buffer | None = None) -> Batch:
        """Read, verify and pad some items; ``ordinals`` count through the sets' tables, one behind the other."""
        frames, tokens = self.columns["num_frames"][items], self.columns["num_tokens"][items]
        feats_BTE = (buffer or Buffer()).take((len(items), int(frames.max()), self.feature_width))
        rows_BL = np.full((len(items), int(tokens.max())), self.targets.pad_row, np.int64)
        ordinals = np.zeros(len(items), np.int64)
        set_of = np.searchsorted(self._first, items, side="right") - 1
        for number in np.unique(set_of):
            one, places = self.sets[number], np.flatnonzero(set_of == number)
            own = items[places] - self._first[number]
            one.fill(feats_BTE.numpy(), places, own)
            for place, item in zip(places, own, strict=True):
                rows_L = self._rows_of[number][one.targets.rows_of(int(one.rows[item]))]
                rows_BL[place, : len(rows_L)] = rows_L
            ordinals[places] = one.ordinals[own] + self._first_ordinal[number]
        return Batch(feats_BTE, torch.from_numpy(frames), torch.from_numpy(rows_BL), torch.from_numpy(tokens), ordinals)


Utterances = SpeechItems | MixedItems


class Sources:
    """The shard sets that a run names, opened with their targets: one folder, or a mapping of folders to weights.

    Args:
        cache, limit_gb: the folder that sets which are far away are mirrored in, and what they may take there; None
            where all are near.

    Raises:
        UserError: a set or its targets are not complete, or sets of other encoders or LLMs are to be mixed.
    """

    def __init__(
        self, where: str | Mapping[str, float], target: str, cache: str | None = None, limit_gb: float = 100.0
    ) -> None:
        self.is_mixed = not isinstance(where, str)
        weights = {where: 1.0} if isinstance(where, str) else dict(where)
        opened: list[tuple[Path, Mirror | None, TargetSet, float]] = []
        for place, weight in weights.items():
            folder, mirror = locate(place, target, cache, limit_gb)
            opened.append((folder, mirror, TargetSet(folder, target), weight))
        # Neither their order in a config nor their folders' names change anything.
        opened.sort(key=lambda one: str(one[2].contract["covers"]["utterances_hash"]))
        self.folders, self.mirrors = [one[0] for one in opened], [one[1] for one in opened]
        self.sets, self.weights = [one[2] for one in opened], [one[3] for one in opened]
        self._require_one_encoder()
        for before, after in itertools.pairwise(opened):
            if before[2].contract["covers"]["utterances_hash"] == after[2].contract["covers"]["utterances_hash"]:
                raise UserError(f"shards names the same set twice, {before[0]} and {after[0]}; name it once")
        self.targets: TargetTable = join(self.sets) if self.is_mixed else self.sets[0]

    def training(self, splits: Sequence[str], seed: int) -> Utterances:
        """The utterances of some splits; every set must have some.

        Raises:
            UserError: a split is in no set, or a set has none of them.
        """
        if not self.is_mixed:
            return self._items(0, splits)
        held = self._held(splits)
        for folder, of_set in zip(self.folders, held, strict=True):
            if not of_set:
                raise UserError(f"shard set {folder} has no utterance in split {', '.join(splits)!r}; leave it out")
        return self._mixed(held, seed)

    def validation(self, splits: Sequence[str]) -> Utterances:
        """The utterances of some splits, from whichever sets have them.

        Raises:
            UserError: a split is in no set.
        """
        if not self.is_mixed:
            return self._items(0, splits)
        return self._mixed(self._held(splits), 0)

    def _items(self, number: int, splits: Sequence[str]) -> SpeechItems:
        return SpeechItems(self.folders[number], self.sets[number], splits, self.mirrors[number])

    def _mixed(self, held: list[list[str]], seed: int) -> MixedItems:
        chosen = [n for n, splits in enumerate(held) if splits]
        items = [self._items(n, held[n]) for n in chosen]
        return MixedItems(items, [self.weights[n] for n in chosen], self.targets, seed)

    def _held(self, splits: Sequence[str]) -> list[list[str]]:
        """Those of the splits that each set has."""
        have = []
        for folder, targets in zip(self.folders, self.sets, strict=True):
            column = shards.read_table(folder, "utterances.parquet").column("split")
            have.append(set(column.take(targets.table.column("utterance")).unique().to_pylist()))
        if missing := sorted(set(splits) - set[str]().union(*have)):
            known = ", ".join(sorted(set[str]().union(*have)))
            raise UserError(f"no shard set has an utterance in split {', '.join(missing)!r}; they have: {known}")
        return [[split for split in splits if split in of_set] for of_set in have]

    def _require_one_encoder(self) -> None:
        contracts = [files.read_json(folder / shards.DATASET) for folder in self.folders]
        for folder, contract in zip(self.folders[1:], contracts[1:], strict=True):
            wanted, found = ({name: one[name] for name in FROZEN_ENCODER} for one in (contracts[0], contract))
            remedy = f"sets are mixed by features of one encoder, as those of {self.folders[0]}"
            shards.require_same(wanted, found, str(folder), remedy)
