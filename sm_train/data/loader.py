"""The steps of one rank: which micro-batches, in which order, read ahead of the training.

Shape letters: B items.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sm_train import config
from sm_train.data import plan
from sm_train.data.batches import Buffer, Columns, Items
from sm_train.data.mds import digest
from sm_train.data.plan import Planner
from sm_train.errors import UserError
from sm_train.records import MicroBatch

Counts = Mapping[str, float]


@dataclass(frozen=True)
class LoaderConfig:
    """How a run reads its data."""

    read_ahead: int = config.key(2, "steps that are read and padded before they are asked for; 0 for none")
    cache: str | None = config.key(
        None, "folder on a local disk that remote shard sets (s3://, gs://, or any path) are mirrored in; null for none"
    )
    cache_limit_gb: float = config.key(100.0, "GB that feature shards may take in the cache, of all sets and runs")

    def __post_init__(self) -> None:
        if self.read_ahead < 0:
            raise ValueError(f"loader.read_ahead is {self.read_ahead}; it must be 0 or more")
        if not 0 < self.cache_limit_gb < math.inf:
            raise ValueError(f"loader.cache_limit_gb is {self.cache_limit_gb}; it must be above 0")


@dataclass(frozen=True, slots=True)
class Step:
    """What one rank does in one step."""

    position: plan.Position
    batches: list[tuple[int, MicroBatch]]
    """(lane, micro-batch) of this rank's lanes."""
    counts: Counts
    """Count of each term over all lanes of the step: the denominators, known without communication."""
    audio_s: float
    padding: float
    """Share of padded frames that hold no audio, over all lanes."""
    items_hash: str
    """Of the ids of all lanes in order: the same on every rank, whatever their number."""
    num_items: int
    """Over all lanes."""
    wait_s: float = 0.0
    """Wall seconds that the rank waited for it."""


def plan_items(items: Items, seed: int, budget: int, lanes: int, window: int = plan.WINDOW_ITEMS) -> Planner:
    """The planner of a stage's items; the budget is in the items' own unit.

    Raises:
        UserError: an item above the budget, or fewer items than lanes.
    """
    sizes = (seed, budget, lanes, window)
    return Planner(items.lengths, *sizes, items.of_epoch, items.ids, items.unit, items.shard_of)


class Loader:
    """The steps of one rank, from any position on: rank r of W takes the lanes r, r + W, ...

    Args:
        read_ahead: steps that a thread prepares before they are asked for; it changes no step.

    Raises:
        UserError: W does not divide the number of lanes, or the items cannot be planned.
    """

    def __init__(
        self, items: Items, counts: Callable[[Columns], Columns], planner: Planner, rank: int, world_size: int,
        read_ahead: int = 2,
    ) -> None:  # fmt: skip
        if planner.lanes % world_size:
            raise UserError(
                f"batch.lanes is {planner.lanes}, which {world_size} ranks do not divide; start a number of ranks that "
                f"does, or, for a new run, take a multiple of {world_size} lanes"
            )
        self.items, self.planner, self.lanes, self.lengths = items, planner, planner.lanes, items.lengths
        self.read_ahead = read_ahead
        self.my_lanes = range(rank, planner.lanes, world_size)
        self.item_counts = counts(items.columns)
        if wrong := {name: np.shape(c) for name, c in self.item_counts.items() if np.shape(c) != items.lengths.shape}:
            raise UserError(
                f"the loss's counts must hold a number for each of {len(items.lengths)} items; they are {wrong}"
            )
        planner.epoch(0)  # what cannot be planned is an error here, before anything is loaded

    def steps(self, position: plan.Position) -> Iterator[Step]:
        """Endless steps from ``position`` on, epoch after epoch.

        A step's tensors are valid until the next step is asked for. What goes wrong with a step is raised where that
        step is asked for.
        """
        prepared = self._prepared(position)
        if not self.read_ahead:
            while True:
                begun = time.perf_counter()
                step = next(prepared)
                yield replace(step, wait_s=time.perf_counter() - begun)
        reader = ThreadPoolExecutor(1, "read-ahead")
        ahead: deque[Future[Step]] = deque(reader.submit(next, prepared) for _ in range(self.read_ahead))
        try:
            while True:
                begun = time.perf_counter()
                ahead.append(reader.submit(next, prepared))
                step = ahead.popleft().result()
                yield replace(step, wait_s=time.perf_counter() - begun)
        finally:
            reader.shutdown(cancel_futures=True)

    def _prepared(self, position: plan.Position) -> Iterator[Step]:
        """The steps in memory that goes round: one the rank has, ``read_ahead`` that wait, one that is being made."""
        sets = itertools.cycle([[Buffer() for _ in self.my_lanes] for _ in range(self.read_ahead + 2)])
        epoch, first = position.epoch, position.step
        while True:
            epoch_plan = self.planner.epoch(epoch)
            for step in range(first, epoch_plan.num_steps):
                yield self._step(epoch_plan, plan.Position(epoch, step), next(sets))
            epoch, first = epoch + 1, 0

    def names(self, position: plan.Position, lanes: Sequence[int], most: int = 8) -> str:
        """The ids of the utterances in some lanes of a step, for a message."""
        epoch_plan = self.planner.epoch(position.epoch)
        ids = [self.items.ids[i] for lane in lanes for i in epoch_plan.micro_batch(position.step, lane)]
        return ", ".join(ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")

    def _step(self, epoch_plan: plan.EpochPlan, position: plan.Position, buffers: Sequence[Buffer]) -> Step:
        of_step = epoch_plan.step_items(position.step)
        lane_items = [epoch_plan.micro_batch(position.step, lane) for lane in range(self.lanes)]
        padded = sum(int(self.lengths[items].max()) * len(items) for items in lane_items)
        mine = zip(self.my_lanes, buffers, strict=True)
        batches = [(lane, self.items.collate(lane_items[lane], position.epoch, buffer)) for lane, buffer in mine]
        return Step(
            position,
            batches,
            {term: float(count[of_step].sum()) for term, count in self.item_counts.items()},
            float(self.items.duration_s[of_step].sum()),
            1.0 - float(self.lengths[of_step].sum()) / padded,
            self._hash(lane_items),
            len(of_step),
        )

    def _hash(self, lane_items: Sequence[NDArray[np.int64]]) -> str:
        lanes = ["".join(f"{self.items.ids[i]}\n" for i in items) for items in lane_items]
        return digest("\n".join(lanes).encode())
