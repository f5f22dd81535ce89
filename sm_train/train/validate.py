"""Validation: nearest-token WER, with no LLM, and stage 2's losses on held-out instructions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from sm_train.data.batches import Items
from sm_train.data.cuts import cut
from sm_train.data.instructions import InstructionItems
from sm_train.data.mixing import Utterances
from sm_train.data.text import normalise
from sm_train.models.mapper import SpeechMapper, positions_of
from sm_train.scoring import decode
from sm_train.scoring.scores import error_counts
from sm_train.train.engines import Engine
from sm_train.train.objectives import Objective


class _Batches:
    """All items once, shortest first, spread over the ranks; every rank takes equally many, as ZeRO-3 asks for."""

    def __init__(self, items: Items, budget: int) -> None:
        order = np.argsort(items.lengths, kind="stable")
        bounds = cut(items.lengths[order], budget)
        self.items = items
        self.pieces = [order[a:b] for a, b in itertools.pairwise(bounds)]

    def of_rank(self, engine: Engine) -> Iterator[tuple[Any, bool]]:
        """(micro-batch, whether it counts): a rank that has none left repeats the shortest."""
        for start in range(0, len(self.pieces), engine.world_size):
            mine = start + engine.rank
            engine.watch.mark("validation")
            piece = self.pieces[mine] if mine < len(self.pieces) else self.pieces[0]
            yield self.items.collate(piece, 0).to(engine.device), mine < len(self.pieces)


class NearestTokenWer:
    """WER of nearest-token decoding over a split, spread over the ranks.

    The vocabulary is the target set's table: the tokens that the corpus uses.
    """

    def __init__(self, items: Utterances, trim: str, budget: int) -> None:
        self.items, self.trim, self.normaliser = items, trim, items.targets.contract["normaliser"]
        self.batches = _Batches(items, budget)
        self.texts = items.utterances.column("text").to_pylist()

    @property
    def vocabulary(self) -> int:
        """Tokens to choose from."""
        return len(self.items.targets.token_ids)

    @torch.no_grad()
    def __call__(self, engine: Engine, mapper: SpeechMapper) -> dict[str, float]:
        """``valid_wer`` in [0, ...], equal on every rank; every rank must call it."""
        targets = self.items.targets
        table_RD = targets.rows_RD.to(engine.device).float()
        was_training = mapper.training
        mapper.eval()
        pairs: list[tuple[str, str]] = []
        for batch, counts in self.batches.of_rank(engine):
            mapped_BPD = mapper(batch.feats_BTE, batch.num_frames_B)
            for b, length in enumerate(positions_of(batch.num_frames_B).tolist() if counts else ()):
                rows = decode.nearest_rows(mapped_BPD[b, :length], table_RD, targets.pad_row, self.trim)
                text = targets.text(rows)
                reference = normalise(self.texts[batch.ordinals[b]], self.normaliser)
                pairs.append((reference, normalise(text, self.normaliser)))
        mapper.train(was_training)
        found = error_counts(pairs, characters=False).sum(axis=0) if pairs else np.zeros(2)
        errors, words = engine.sum_over_ranks(torch.from_numpy(found)).tolist()
        return {"valid_wer": float(errors / words)}


class InstructionLosses:
    """The objective on held-out instructions, answers given (teacher forcing)."""

    def __init__(self, items: InstructionItems, budget: int) -> None:
        self.items, self.batches = items, _Batches(items, budget)

    @torch.no_grad()
    def __call__(self, engine: Engine, objective: Objective) -> dict[str, float]:
        """``valid_loss``, ``valid_ce`` per token and ``valid_accuracy`` of tokens; every rank must call it."""
        terms = [*objective.weights, *objective.measures]
        totals = torch.zeros(len(terms), dtype=torch.float64)
        engine.module.eval()
        for batch, counts in self.batches.of_rank(engine):
            sums = engine.forward(batch)
            if counts:
                totals += torch.stack([sums[term] for term in terms]).double().cpu()
        engine.module.train()
        sums_over_ranks = dict(zip(terms, engine.sum_over_ranks(totals).tolist(), strict=True))
        counted = objective.counts(self.items.columns)
        means = {t: total / float(counted[t].sum()) for t, total in sums_over_ranks.items() if counted[t].sum()}
        loss = sum(weight * means[term] for term, weight in objective.weights.items() if term in means)
        return {"valid_loss": loss, "valid_ce": means["ce"], "valid_accuracy": means["accuracy"]}
