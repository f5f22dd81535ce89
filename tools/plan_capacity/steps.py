"""The steps of training, planned by the trainer's own planner on a sample of the corpus."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sm_train.data.plan import Planner
from sm_train.errors import UserError
from tools.plan_capacity.corpus import Corpus
from tools.plan_capacity.hardware import Batch
from tools.plan_capacity.shapes import Shapes


@dataclass(frozen=True)
class Steps:
    """Means of a step; a rank runs G / W micro-batches one after the other."""

    padded: float
    """Frames or tokens of the rank that has most, padding included."""
    real: float
    """Of all ranks."""
    items: float
    """Of all ranks."""
    micro_batches: float
    """Of a rank."""
    per_epoch: float
    """Steps in which a corpus of the planned size is gone through once."""
    largest: tuple[int, int]
    """Items, and longest of them, of the largest micro-batch."""

    @property
    def filled(self) -> float:
        """Real by padded, waiting for the rank with most included."""
        return self.real / self.padded


def _plan(
    lengths: NDArray[np.int64], costs: NDArray[np.int64], budget: int, lanes: int, ranks: int, window: int, seed: int,
    num_items: float, what: str,
) -> Steps:  # fmt: skip
    """An epoch of the sample, as the trainer plans it.

    Args:
        lengths: what an item is long [N].
        costs: what the budget counts [N].
    """
    if lanes % ranks:
        divisors = [str(n) for n in range(1, lanes + 1) if lanes % n == 0]
        more = lanes * ranks // np.gcd(lanes, ranks)
        raise UserError(
            f"{what}: {ranks} GPUs do not divide batch.lanes, {lanes}; give {what}.gpus one of {', '.join(divisors)}, "
            f"or {what}.words=[batch.lanes={more}]"
        )
    made = Planner(costs, seed, budget, lanes, window).epoch(0)
    longest = np.maximum.reduceat(lengths[made.items], made.bounds[:-1])
    sizes = np.diff(made.bounds)
    padded = (longest * sizes).reshape(-1, lanes // ranks, ranks)  # lane r, r + W, ... are rank r's
    largest = int(np.argmax(longest * sizes))
    return Steps(
        padded=float(padded.sum(axis=1).max(axis=1).mean()),
        real=float(lengths.sum()) / made.num_steps,
        items=len(lengths) / made.num_steps,
        micro_batches=lanes / ranks,
        per_epoch=made.num_steps * num_items / len(lengths),
        largest=(int(sizes[largest]), int(longest[largest])),
    )


def pretraining(corpus: Corpus, shapes: Shapes, ranks: int) -> Steps:
    """Steps of stage 1, in stored frames.

    Raises:
        UserError: the ranks do not divide the lanes, or an utterance is above the budget.
    """
    cfg, frames = shapes.pretrain, corpus.frames(shapes.frame_hz)
    batch = cfg.batch
    return _plan(frames, frames, batch.frames, batch.lanes, ranks, batch.window, cfg.seed, corpus.num_train, "pretrain")


def tuning(corpus: Corpus, shapes: Shapes, ranks: int) -> Steps:
    """Steps of stage 2, in tokens of the LLM: prompt, positions and answer; an answer is as long as its transcript.

    Raises:
        UserError: the ranks do not divide the lanes, or a row is above the budget.
    """
    cfg, batch = shapes.tune, shapes.tune.batch
    answers = corpus.tokens / corpus.mean_s * corpus.durations_s
    rows = np.round(corpus.prompt_tokens + corpus.frames(shapes.frame_hz) // 4 + answers).astype(np.int64)
    costs = np.ones_like(rows) if batch.samples else rows
    return _plan(rows, costs, batch.budget, batch.lanes, ranks, batch.window, cfg.seed, corpus.num_train, "tune")


def micro_batch(corpus: Corpus, shapes: Shapes, steps: Steps, *, largest: bool) -> Batch:
    """A micro-batch of stage 2: the largest, or the mean one of the rank that has most."""
    items, row = steps.largest
    if not largest:
        row = round(corpus.prompt_tokens + corpus.tokens + corpus.mean_s * shapes.frame_hz / 4)
        items = max(round(steps.padded / steps.micro_batches / row), 1)
    speech = (row - corpus.prompt_tokens) / (shapes.frame_hz / 4 + corpus.tokens / corpus.mean_s)
    positions, answer = speech * shapes.frame_hz / 4, speech * corpus.tokens / corpus.mean_s
    return Batch(items, row, round(positions), round(answer) + 1)
