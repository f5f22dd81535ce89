"""Cutting a row of items into micro-batches: greedy runs under a budget, and halves of the largest.

Whole arrays instead of items one by one: all blocks of a row advance together, a run a round.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

BLOCK_ITEMS = 16384
"""So many items, or the whole windows that hold them, are cut on their own."""
_AT_ONCE = 2**20


def cut(lengths: NDArray[np.int64], budget: int, ends: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """Bounds of greedy runs whose count times longest stays within the budget; an item above it is a run alone.

    Args:
        ends: where a run must end whatever the budget, ascending, the last being N; None for every 16384th.

    Returns:
        Bounds, from 0 to N; of at most 16384 items they are those of one greedy pass.
    """
    if ends is None:
        ends = np.append(np.arange(BLOCK_ITEMS, len(lengths), BLOCK_ITEMS), len(lengths))
    bounds, begin = [np.zeros(1, np.int64)], 0
    # Some blocks at a time, so that the table of longest stays small.
    for last in np.flatnonzero(np.diff(ends // _AT_ONCE, append=-1)):
        end = int(ends[last])
        part = ends[(ends > begin) & (ends <= end)]
        bounds.append(begin + _cut_blocks(lengths[begin:end], budget, part - begin))
        begin = end
    return np.sort(np.concatenate(bounds))


def _cut_blocks(lengths: NDArray[np.int64], budget: int, ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """The end of every run: all blocks advance together, a run a round, each run found by doubling steps."""
    if not len(lengths):
        return np.zeros(0, np.int64)
    most = min(int(np.diff(ends, prepend=0).max()), max(budget // max(int(lengths.min()), 1), 1))
    longest_of = [lengths]  # [k][i]: the longest of the 2^k items from i on
    while 2 ** len(longest_of) <= most:
        half = 2 ** (len(longest_of) - 1)
        longest_of.append(np.maximum(longest_of[-1][:-half], longest_of[-1][half:]))
    found = []
    begin, limit = np.concatenate([[0], ends[:-1]]), ends
    while len(begin):
        end, longest = begin + 1, lengths[begin]
        for k in reversed(range(len(longest_of))):
            reach = end + 2**k
            of_more = np.maximum(longest, longest_of[k].take(end, mode="clip"))
            fits = (of_more * (reach - begin) <= budget) & (reach <= limit)
            end, longest = np.where(fits, reach, end), np.where(fits, of_more, longest)
        found.append(end)
        going = end < limit
        begin, limit = end[going], limit[going]
    return np.concatenate(found)


def halve(bounds: NDArray[np.int64], lengths: NDArray[np.int64], times: int) -> NDArray[np.int64] | None:
    """Bounds once the largest run (by count times longest) was halved so many times; None if items do not suffice."""
    if not times:
        return bounds
    sizes = np.diff(bounds)
    costs = np.where(sizes > 1, np.maximum.reduceat(lengths, bounds[:-1]) * sizes, -1)
    # Of the runs of now, only so many of the largest can be halved.
    least = max(int(np.partition(costs, -times)[-times]) if times <= len(costs) else 0, 0)
    large = np.flatnonzero(costs >= least)
    runs = list(zip((-costs[large]).tolist(), bounds[large].tolist(), bounds[large + 1].tolist(), strict=True))
    heapq.heapify(runs)
    middles: list[int] = []
    while len(middles) < times:
        if not runs:
            return None
        _, begin, end = heapq.heappop(runs)
        middles.append((begin + end) // 2)
        for a, b in ((begin, middles[-1]), (middles[-1], end)):
            if b - a > 1:
                heapq.heappush(runs, (-int(lengths[a:b].max()) * (b - a), a, b))
    return np.sort(np.append(bounds, middles))
