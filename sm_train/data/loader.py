"""The steps of one rank: which micro-batches, in which order, read ahead of the training.

Shape letters: B items.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sm_train.data import plan
from sm_train.data.batches import Columns, Items
from sm_train.data.plan import Planner
from sm_train.errors import UserError
from sm_train.records import MicroBatch

Counts = Mapping[str, float]


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
    wait_s: float
    """Wall seconds this rank spent reading and collating."""


def plan_items(items: Items, seed: int, budget: int, lanes: int, window: int = plan.WINDOW_ITEMS) -> Planner:
    """The planner of a stage's items; the budget is in the items' own unit.

    Raises:
        UserError: an item above the budget, or fewer items than lanes.
    """
    return Planner(items.lengths, seed, budget, lanes, window, items.of_epoch, items.ids, items.unit)


class Loader:
    """The steps of one rank, from any position on: rank r of W takes the lanes r, r + W, ...

    Raises:
        UserError: W does not divide the number of lanes, or the items cannot be planned.
    """

    def __init__(
        self, items: Items, counts: Callable[[Columns], Columns], planner: Planner, rank: int, world_size: int
    ) -> None:
        if planner.lanes % world_size:
            raise UserError(
                f"batch.lanes is {planner.lanes}, which {world_size} ranks do not divide; "
                f"take a multiple of {world_size}"
            )
        self.items, self.planner, self.lanes, self.lengths = items, planner, planner.lanes, items.lengths
        self.my_lanes = range(rank, planner.lanes, world_size)
        self.item_counts = counts(items.columns)
        planner.epoch(0)  # what cannot be planned is an error here, before anything is loaded

    def steps(self, position: plan.Position) -> Iterator[Step]:
        """Endless steps from ``position`` on, epoch after epoch."""
        epoch, first = position.epoch, position.step
        while True:
            epoch_plan = self.planner.epoch(epoch)
            for step in range(first, epoch_plan.num_steps):
                yield self._step(epoch_plan, plan.Position(epoch, step))
            epoch, first = epoch + 1, 0

    def names(self, position: plan.Position, lanes: Sequence[int], most: int = 8) -> str:
        """The ids of the utterances in some lanes of a step, for a message."""
        epoch_plan = self.planner.epoch(position.epoch)
        ids = [self.items.ids[i] for lane in lanes for i in epoch_plan.micro_batch(position.step, lane)]
        return ", ".join(ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")

    def _step(self, epoch_plan: plan.EpochPlan, position: plan.Position) -> Step:
        start = time.perf_counter()
        of_step = epoch_plan.step_items(position.step)
        lane_items = [epoch_plan.micro_batch(position.step, lane) for lane in range(self.lanes)]
        padded = sum(int(self.lengths[items].max()) * len(items) for items in lane_items)
        batches = [(lane, self.items.collate(lane_items[lane], position.epoch)) for lane in self.my_lanes]
        return Step(
            position,
            batches,
            {term: float(count[of_step].sum()) for term, count in self.item_counts.items()},
            float(self.items.duration_s[of_step].sum()),
            1.0 - float(self.lengths[of_step].sum()) / padded,
            time.perf_counter() - start,
        )
