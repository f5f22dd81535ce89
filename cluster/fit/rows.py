"""How long the rows of a micro-batch are: from the tables of a local shard set, else as LibriSpeech's mean one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster.fit.memory import Batch
from sm_train.data import shards
from sm_train.data.lengths import num_positions
from sm_train.data.target_set import TABLE, UTTERANCES
from sm_train.errors import UserError

PROMPT = 40
"""Tokens of a prompt around the speech, template included. Assumed."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Utterances as a training stage sees them."""

    positions: float = 77.0
    """Mean, of an utterance of 12.3 s."""
    tokens: float = 44.0
    """Mean, of its transcript."""
    longest_positions: int = 77
    longest_tokens: int = 44

    def piece(self, frames: int, split: int) -> int:
        """Padded frames of a piece of a micro-batch: no utterance is cut."""
        return max(frames // split, min(frames, 4 * self.longest_positions))

    def batch(self, samples: int, tokens: int, split: int) -> Batch:
        """A micro-batch of stage 2, or a piece of one, that needs the most; an answer is as long as its transcript.

        A budget in samples may be filled with the longest rows; one in tokens is full with rows of any length, and its
        shares of speech and answer are taken from the mean row, the answers' half as large again.
        """
        if samples:
            row = PROMPT + self.longest_positions + self.longest_tokens
            return Batch(-(-samples // split), row, self.longest_positions, self.longest_tokens + 1)
        row = round(PROMPT + self.positions + self.tokens)
        items = max(tokens // split // row, 1)
        return Batch(items, row, round(self.positions), round(1.5 * self.tokens) + 1)


def read_rows(sets: Sequence[str], target: str, splits: Sequence[str]) -> tuple[Rows, str]:
    """The rows of the largest local shard set, and what is assumed where there is none."""
    largest: tuple[int, Rows] | None = None
    for folder in sets:
        if "://" in folder or not shards.is_complete(Path(folder)):
            continue
        try:
            table = shards.read_table(Path(folder), UTTERANCES)
            root = Path(folder) / "targets" / target
            tokens = shards.read_table(root, TABLE).column("num_tokens").to_numpy() if root.is_dir() else np.zeros(0)
        except UserError:  # a damaged table is another check's to report
            continue
        is_asked = np.isin(np.array(table.column("split").to_pylist()), list(splits))
        positions = num_positions(table.column("num_frames").to_numpy().astype(np.int64))[is_asked]
        if not len(positions) or (largest and len(positions) < largest[0]):
            continue
        tokens = tokens if len(tokens) else positions / 2
        sizes = (float(positions.mean()), float(tokens.mean()), int(positions.max()), int(tokens.max()))
        largest = len(positions), Rows(*sizes)
    if largest is None:
        return Rows(), "every row as LibriSpeech's mean one, as no complete shard set is here"
    return largest[1], ""
