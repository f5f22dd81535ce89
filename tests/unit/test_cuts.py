"""Cuts under a budget: greedy, exact inside a block, and halves of the largest."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sm_train.data import cuts


def greedy(lengths: np.ndarray, budget: int) -> list[int]:
    bounds, longest = [0], 0
    for i, length in enumerate(lengths.tolist()):
        longest = max(longest, length)
        if i > bounds[-1] and longest * (i + 1 - bounds[-1]) > budget:
            bounds.append(i)
            longest = length
    return [*bounds, len(lengths)]


@pytest.mark.parametrize("seed", range(30))
def test_the_cut_is_the_greedy_one(seed: int) -> None:
    """Every run is as long as the budget lets it be, checked item by item."""
    rng = np.random.default_rng(seed)
    lengths, budget = rng.integers(1, 30, size=rng.integers(1, 60)), int(rng.integers(30, 120))
    bounds = cuts.cut(lengths, budget)
    assert bounds[0] == 0
    assert bounds[-1] == len(lengths)
    for begin, end in itertools.pairwise(bounds):
        assert end > begin
        assert lengths[begin:end].max() * (end - begin) <= budget
        if end < len(lengths):
            assert lengths[begin : end + 1].max() * (end + 1 - begin) > budget


def test_the_cut_leaves_an_item_above_the_budget_alone() -> None:
    assert cuts.cut(np.array([50, 50, 3]), 10).tolist() == [0, 1, 2, 3]
    assert cuts.cut(np.array([3, 3, 50, 3]), 10).tolist() == [0, 2, 3, 4]


def test_cuts_stay_exact_where_the_items_are_too_many_for_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(5).integers(1, 200, size=60_000)
    whole = cuts.cut(lengths, 600)
    monkeypatch.setattr(cuts, "_AT_ONCE", 20_000)
    assert np.array_equal(cuts.cut(lengths, 600), whole)
    assert cuts.cut(lengths[:16384], 600).tolist() == greedy(lengths[:16384], 600)


def test_runs_end_where_they_are_told_to() -> None:
    lengths = np.random.default_rng(6).integers(1, 200, size=500)
    ends = np.array([7, 8, 300, 500])
    expected = [0, *(a + b for a, e in itertools.pairwise([0, *ends]) for b in greedy(lengths[a:e], 600)[1:])]
    assert cuts.cut(lengths, 600, ends).tolist() == expected


def test_the_largest_is_halved_first_and_a_half_may_be_halved_again() -> None:
    lengths = np.array([10, 10, 10, 10, 1, 1])
    assert cuts.halve(np.array([0, 4, 6]), lengths, 0).tolist() == [0, 4, 6]
    assert cuts.halve(np.array([0, 4, 6]), lengths, 1).tolist() == [0, 2, 4, 6]
    assert cuts.halve(np.array([0, 4, 6]), lengths, 3).tolist() == [0, 1, 2, 3, 4, 6]
    assert cuts.halve(np.array([0, 4, 6]), lengths, 4).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert cuts.halve(np.array([0, 4, 6]), lengths, 5) is None
