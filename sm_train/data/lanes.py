"""The batch plan of a set that is far away: every lane has windows of its own, so that it reads few shards at a time.

An epoch permutes the shards and deals them out in windows, at least so many shards a lane, whose lanes get neighbouring
pieces of equally many frames: two lanes share at most the shard between them. A lane sorts its piece, and cuts it under
the budget; the largest are halved until every lane has as many micro-batches as the one with the most; the r-th of all
lanes, neighbours in length, make a step; the steps are shuffled inside the window. What cannot be levelled so is dealt
again at the epoch's end, as an ordinary plan.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from sm_train.data.cuts import cut, halve
from sm_train.data.plan import SHARDS_PER_WINDOW, EpochPlan, plan_epoch
from sm_train.errors import UserError

Runs = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Where micro-batches begin and end in the order of items [steps, G each]."""


def plan_lanes(
    lengths: NDArray[np.int64], shard_of: NDArray[np.int64], seed: int, epoch: int, budget: int, lanes: int,
    shards_per_window: int = SHARDS_PER_WINDOW,
) -> EpochPlan:  # fmt: skip
    """Plan one epoch by lanes.

    Args:
        lengths: what each item costs [N].
        shard_of: the shard that each item lies in, any numbers [N].
        shards_per_window: the fewest shards in a lane's window, if there are so many; less than twice as many at most,
            and parts of two more.

    Returns:
        A plan that holds each item exactly once.

    Raises:
        UserError: there are too few items for a multiple of ``lanes``.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    order, ends = _deal(lengths, shard_of, lanes, shards_per_window, rng)
    ordered = lengths[order]
    bounds = cut(ordered, budget, np.unique(ends[ends > 0]))
    windows: list[Runs] = []
    rest: list[NDArray[np.int64]] = []
    for number, window in enumerate(ends.reshape(-1, lanes)):
        begin = int(ends[number * lanes - 1]) if number else 0
        runs, left = _level(bounds, ordered, [begin, *window.tolist()])
        steps = rng.permutation(len(runs[0]))
        windows.append((runs[0][steps], runs[1][steps]))
        rest.extend(order[a:b] for a, b in left)
    tail = _deal_again(windows, rest, order, lengths, seed, epoch, budget, lanes)
    return _assemble(order, windows, tail, lanes)


def _deal(
    lengths: NDArray[np.int64], shard_of: NDArray[np.int64], lanes: int, shards_per_window: int,
    rng: np.random.Generator,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:  # fmt: skip
    """Items by window and lane, each lane's sorted by length [N]; where the pieces end [windows x G]."""
    permuted = rng.permutation(len(lengths))
    shards, number = np.unique(shard_of, return_inverse=True)
    place = rng.permutation(len(shards))[number]
    order = permuted[_stable_order(place[permuted])]
    num_windows = max(1, len(shards) // (shards_per_window * lanes))
    window = place[order] * num_windows // len(shards)
    sizes = lengths[order]
    first = np.searchsorted(window, np.arange(num_windows))
    total = np.add.reduceat(sizes, first)
    # An item belongs to the lane that its middle falls to.
    middle_twice = 2 * np.cumsum(sizes) - sizes - 2 * (np.cumsum(total) - total)[window]
    piece = window * lanes + middle_twice * lanes // (2 * total[window])
    ends = np.searchsorted(piece, np.arange(num_windows * lanes), side="right")
    by_size = _stable_order(sizes)
    return order[by_size[_stable_order(piece[by_size])]], ends.astype(np.int64)


def _stable_order(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """The order that sorts ``values``, equal ones as they stand; numpy sorts 16 bits by radix."""
    small = values.astype(np.uint16) if values.max() < 2**16 else values
    return np.argsort(small, kind="stable")


def _level(
    bounds: NDArray[np.int64], lengths: NDArray[np.int64], edges: list[int]
) -> tuple[Runs, list[tuple[int, int]]]:
    """One window: equally many micro-batches in every lane, sorted by length; the runs of items that are left over."""
    cuts = []
    for begin, end in itertools.pairwise(edges):
        first, last = np.searchsorted(bounds, [begin, end])
        cuts.append(bounds[first : last + 1])
    steps = min(max(len(one) - 1 for one in cuts), min(b - a for a, b in itertools.pairwise(edges)))
    left = []
    for lane, (begin, end) in enumerate(itertools.pairwise(edges)):
        if (surplus := len(cuts[lane]) - 1 - steps) > 0:
            left.append((int(cuts[lane][steps]), end))
            cuts[lane] = cuts[lane][: steps + 1]
        elif surplus < 0:
            made = halve(cuts[lane] - begin, lengths[begin:end], -surplus)
            assert made is not None  # a lane has at least as many items as steps
            cuts[lane] = begin + made
    return (np.stack([one[:-1] for one in cuts], axis=1), np.stack([one[1:] for one in cuts], axis=1)), left


def _deal_again(
    windows: list[Runs], rest: list[NDArray[np.int64]], order: NDArray[np.int64], lengths: NDArray[np.int64],
    seed: int, epoch: int, budget: int, lanes: int,
) -> EpochPlan | None:  # fmt: skip
    """An ordinary plan of what is left over; while that cannot fill the lanes, the last window goes with it."""
    while rest:
        items = np.concatenate(rest)
        try:
            if len(items) >= lanes or not windows:
                made = plan_epoch(lengths[items], seed, epoch, budget, lanes)
                return EpochPlan(items[made.items], made.bounds, lanes)
        except UserError:
            if not windows:
                raise
        rest.extend(order[a:b] for a, b in zip(*(edge.ravel().tolist() for edge in windows.pop()), strict=True))
    return None


def _assemble(order: NDArray[np.int64], windows: list[Runs], tail: EpochPlan | None, lanes: int) -> EpochPlan:
    begins, ends = (np.concatenate([np.zeros(0, np.int64), *(one[i].ravel() for one in windows)]) for i in (0, 1))
    sizes = ends - begins
    bounds = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    items = order[np.repeat(begins - bounds[:-1], sizes) + np.arange(bounds[-1])]
    if tail is not None:
        items = np.concatenate([items, tail.items])
        bounds = np.concatenate([bounds, bounds[-1] + tail.bounds[1:]])
    return EpochPlan(items, bounds, lanes)
