"""Validation of stage 1 with no LLM: each position's nearest token, read as text, against the transcript."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from sm_train.data.batches import SpeechItems
from sm_train.data.plan import cut
from sm_train.data.text import normalise
from sm_train.models.mapper import SpeechMapper, positions_of
from sm_train.scoring import decode
from sm_train.scoring.scores import error_counts
from sm_train.train.engines import Engine


class NearestTokenWer:
    """WER of nearest-token decoding over a split, spread over the ranks.

    The vocabulary is the target set's table: the tokens that the corpus uses.
    """

    def __init__(self, items: SpeechItems, trim: str, budget: int) -> None:
        self.items, self.trim, self.normaliser = items, trim, items.targets.contract["normaliser"]
        lengths = items.columns["num_frames"]
        order = np.argsort(lengths, kind="stable")
        bounds = cut(lengths[order], budget)
        self.batches = [order[a:b] for a, b in itertools.pairwise(bounds)]
        self.texts = items.utterances.column("text").to_pylist()

    @property
    def vocabulary(self) -> int:
        """Tokens to choose from."""
        return len(self.items.targets.token_ids)

    @torch.no_grad()
    def __call__(self, engine: Engine, mapper: SpeechMapper) -> float:
        """The WER in [0, ...], equal on every rank; every rank must call it."""
        targets = self.items.targets
        table_RD = targets.rows_RD.to(engine.device).float()
        was_training = mapper.training
        mapper.eval()
        pairs: list[tuple[str, str]] = []
        for items in self.batches[engine.rank :: engine.world_size]:
            batch = self.items.collate(items).to(engine.device)
            mapped_BPD = mapper(batch.feats_BTE, batch.num_frames_B)
            for b, length in enumerate(positions_of(batch.num_frames_B).tolist()):
                rows = decode.nearest_rows(mapped_BPD[b, :length], table_RD, targets.pad_row, self.trim)
                text = targets.text(rows)
                reference = normalise(self.texts[batch.ordinals[b]], self.normaliser)
                pairs.append((reference, normalise(text, self.normaliser)))
        mapper.train(was_training)
        counts = error_counts(pairs, characters=False).sum(axis=0) if pairs else np.zeros(2)
        errors, words = engine.sum_over_ranks(torch.from_numpy(counts)).tolist()
        return float(errors / words)
