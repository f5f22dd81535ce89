"""Lane windows: each item once, the budget kept, few shards a lane at a time, pure, and any number of shards."""

from __future__ import annotations

import numpy as np
import pytest

from sm_train.data.lanes import plan_lanes
from sm_train.data.plan import EpochPlan, Planner
from sm_train.errors import UserError

BUDGET, LANES, IN_SHARD = 2000, 4, 40


@pytest.fixture(scope="module")
def lengths() -> np.ndarray:
    return np.random.default_rng(0).integers(20, 200, size=IN_SHARD * 150 + 7)


@pytest.fixture(scope="module")
def shard_of(lengths: np.ndarray) -> np.ndarray:
    """Shard numbers with gaps; the last shard holds few."""
    return np.arange(len(lengths)) // IN_SHARD * 3 + 5


def lane_of_items(made: EpochPlan, lane: int) -> list[np.ndarray]:
    return [made.micro_batch(step, lane) for step in range(made.num_steps)]


@pytest.mark.parametrize("lanes", [1, 2, 3, 8, 24])
@pytest.mark.parametrize("budget", [250, 2000, 50_000])
def test_each_item_once_and_the_budget_kept(lengths: np.ndarray, shard_of: np.ndarray, lanes: int, budget: int) -> None:
    made = plan_lanes(lengths, shard_of, 3, 1, budget, lanes)
    assert (len(made.bounds) - 1) % lanes == 0
    assert sorted(made.items.tolist()) == list(range(len(lengths)))
    assert made.bounds[0] == 0
    assert made.bounds[-1] == len(lengths)
    sizes = np.diff(made.bounds)
    assert sizes.min() > 0
    assert (np.maximum.reduceat(lengths[made.items], made.bounds[:-1]) * sizes).max() <= budget


@pytest.mark.parametrize("epoch", range(3))
def test_a_lane_reads_few_shards_in_a_window_and_shares_few_with_others(
    lengths: np.ndarray, shard_of: np.ndarray, epoch: int
) -> None:
    """151 shards, 4 lanes, 16 a window: two windows of 75 and 76 shards, up to 19 a lane and parts of two more."""
    made = plan_lanes(lengths, shard_of, 0, epoch, BUDGET, LANES)
    everything = [set(shard_of[np.concatenate(lane_of_items(made, lane))]) for lane in range(LANES)]
    changes = [
        step for step in range(1, made.num_steps) if not _shards(made, shard_of, step) & _before(made, shard_of, step)
    ]
    assert len(changes) == 1  # the second window has shards of its own
    for lane in range(LANES):
        items = lane_of_items(made, lane)
        for window in (items[: changes[0]], items[changes[0] :]):
            assert 16 <= len(set(shard_of[np.concatenate(window)])) <= 19 + 2
    assert sum(map(len, everything)) <= 151 + 2 * (LANES - 1)


def _shards(made: EpochPlan, shard_of: np.ndarray, step: int) -> set[int]:
    return set(shard_of[made.items[made.bounds[step * made.lanes] :]].tolist())


def _before(made: EpochPlan, shard_of: np.ndarray, step: int) -> set[int]:
    return set(shard_of[made.items[: made.bounds[step * made.lanes]]].tolist())


def test_the_lanes_of_a_step_are_neighbours_in_length_and_little_is_wasted(
    lengths: np.ndarray, shard_of: np.ndarray
) -> None:
    made = plan_lanes(lengths, shard_of, 0, 0, BUDGET, LANES)
    longest = np.maximum.reduceat(lengths[made.items], made.bounds[:-1])
    shuffled = np.random.default_rng(0).permutation(longest).reshape(-1, LANES)
    assert np.ptp(longest.reshape(-1, LANES), axis=1).mean() < 0.1 * np.ptp(shuffled, axis=1).mean()
    slowest = (longest * np.diff(made.bounds)).reshape(-1, LANES).max(axis=1)
    assert lengths.sum() / (LANES * slowest.sum()) > 0.93
    of_step = longest.reshape(-1, LANES).max(axis=1)
    assert abs(np.corrcoef(of_step[:-1], of_step[1:])[0, 1]) < 0.25


@pytest.mark.parametrize("num_shards", [1, 2, 3, 5, 17])
def test_fewer_shards_than_windows_need_still_fill_the_lanes(lengths: np.ndarray, num_shards: int) -> None:
    some = lengths[: 40 * num_shards]
    made = plan_lanes(some, np.arange(len(some)) // 40, 0, 0, BUDGET, LANES)
    assert sorted(made.items.tolist()) == list(range(len(some)))
    assert (len(made.bounds) - 1) % LANES == 0


def test_shards_of_very_uneven_sizes_and_a_few_giants_fill_the_lanes() -> None:
    rng = np.random.default_rng(1)
    shard_of = np.repeat(np.arange(90), rng.integers(1, 60, size=90))
    for lengths in (rng.integers(1, 900, size=len(shard_of)), np.where(np.arange(len(shard_of)) == 3, 2000, 1)):
        made = plan_lanes(lengths, shard_of, 0, 0, BUDGET, 3)
        assert sorted(made.items.tolist()) == list(range(len(shard_of)))
        assert (len(made.bounds) - 1) % 3 == 0


@pytest.mark.parametrize("count", [400, 404, 640])
def test_items_that_nothing_levels_are_dealt_again_at_the_end(count: int) -> None:
    """Every item fills a micro-batch, and the lanes' windows hold unequal numbers of them."""
    shard_of = np.repeat(np.arange(count // 4), 4)
    shard_of[-9:] = shard_of[-1]
    lengths = np.random.default_rng(2).integers(60, 100, size=count)
    made = plan_lanes(lengths, shard_of, 0, 0, 100, LANES, shards_per_window=2)
    assert sorted(made.items.tolist()) == list(range(count))
    assert np.diff(made.bounds).tolist() == [1] * count


def test_items_that_cannot_fill_the_lanes_are_an_error() -> None:
    with pytest.raises(UserError, match="41 items fill 41 micro-batches"):
        plan_lanes(np.full(41, 60), np.arange(41), 0, 0, 100, LANES, shards_per_window=2)


def test_it_is_a_pure_function_and_epochs_differ(lengths: np.ndarray, shard_of: np.ndarray) -> None:
    one = plan_lanes(lengths, shard_of, 3, 5, BUDGET, LANES)
    np.random.seed(1)
    same = plan_lanes(lengths.copy(), shard_of * 7, 3, 5, BUDGET, LANES)
    assert np.array_equal(one.items, same.items)
    assert np.array_equal(one.bounds, same.bounds)
    for seed, epoch in ((3, 6), (4, 5)):
        assert not np.array_equal(one.items, plan_lanes(lengths, shard_of, seed, epoch, BUDGET, LANES).items)


def test_a_planner_that_knows_the_shards_plans_by_lanes(lengths: np.ndarray, shard_of: np.ndarray) -> None:
    planner = Planner(lengths, 3, BUDGET, LANES, shard_of=shard_of)
    expected = plan_lanes(lengths, shard_of, 3, 2, BUDGET, LANES)
    assert np.array_equal(planner.epoch(2).items, expected.items)
    assert np.array_equal(planner.epoch(2).bounds, expected.bounds)
    half = np.arange(0, len(lengths), 2)
    chosen = Planner(lengths, 3, BUDGET, LANES, of_epoch=lambda epoch: half, shard_of=shard_of).epoch(0)
    assert sorted(chosen.items.tolist()) == half.tolist()
    others = [
        Planner(lengths, 3, BUDGET, LANES),
        Planner(lengths, 3, BUDGET, LANES, shard_of=shard_of, shards_per_window=17),
        Planner(lengths, 3, BUDGET, LANES, shard_of=shard_of // 2),
    ]
    assert len({one.fingerprint for one in [planner, *others]}) == 4
