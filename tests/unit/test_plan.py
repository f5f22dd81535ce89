"""The batch plan: each item once, the budget kept, a multiple of G, pure, neighbours in length."""

from __future__ import annotations

import heapq
import itertools

import numpy as np
import pytest

from sm_train.data import plan
from sm_train.errors import UserError
from tests.unit.test_cuts import greedy

BUDGET, LANES = 600, 4


@pytest.fixture(scope="module")
def lengths() -> np.ndarray:
    return np.random.default_rng(0).integers(4, 200, size=9001)


def micro_batches(made: plan.EpochPlan) -> list[np.ndarray]:
    return [made.micro_batch(step, lane) for step in range(made.num_steps) for lane in range(made.lanes)]


@pytest.mark.parametrize("lanes", [1, 2, 3, 4, 24, 48])
@pytest.mark.parametrize("epoch", [0, 7])
def test_each_item_stands_in_one_micro_batch_of_an_epoch(lengths: np.ndarray, lanes: int, epoch: int) -> None:
    made = plan.plan_epoch(lengths, 3, epoch, BUDGET, lanes)
    assert len(micro_batches(made)) == lanes * made.num_steps == len(made.bounds) - 1
    assert sorted(np.concatenate(micro_batches(made)).tolist()) == list(range(len(lengths)))
    assert all(len(items) for items in micro_batches(made))


@pytest.mark.parametrize("seed", range(5))
def test_every_micro_batch_keeps_the_budget(lengths: np.ndarray, seed: int) -> None:
    made = plan.plan_epoch(lengths, seed, 0, BUDGET, LANES)
    costs = [lengths[items].max() * len(items) for items in micro_batches(made)]
    assert max(costs) <= BUDGET
    assert np.mean(costs) > 0.75 * BUDGET  # and does not waste it


def test_a_step_is_the_micro_batches_of_its_lanes(lengths: np.ndarray) -> None:
    made = plan.plan_epoch(lengths, 0, 0, BUDGET, LANES)
    for step in (0, made.num_steps - 1):
        joined = np.concatenate([made.micro_batch(step, lane) for lane in range(LANES)])
        assert made.step_items(step).tolist() == joined.tolist()


def test_equal_arguments_give_equal_plans(lengths: np.ndarray) -> None:
    np.random.seed(1)
    one = plan.plan_epoch(lengths, 3, 5, BUDGET, LANES)
    np.random.seed(2)
    other = plan.plan_epoch(lengths.copy(), 3, 5, BUDGET, LANES)
    assert np.array_equal(one.items, other.items)
    assert np.array_equal(one.bounds, other.bounds)


@pytest.mark.parametrize(("seed", "epoch"), [(3, 6), (4, 5), (5, 3)])
def test_another_epoch_or_seed_gives_other_steps(lengths: np.ndarray, seed: int, epoch: int) -> None:
    def steps(made: plan.EpochPlan) -> set[frozenset[int]]:
        return {frozenset(made.step_items(step).tolist()) for step in range(made.num_steps)}

    one = steps(plan.plan_epoch(lengths, 3, 5, BUDGET, LANES))
    other = steps(plan.plan_epoch(lengths, seed, epoch, BUDGET, LANES))
    assert len(one & other) < 0.05 * len(one)


def test_the_lanes_of_a_step_are_neighbours_in_length(lengths: np.ndarray) -> None:
    made = plan.plan_epoch(lengths, 0, 0, BUDGET, LANES)
    longest = np.array([lengths[items].max() for items in micro_batches(made)]).reshape(-1, LANES)
    shuffled = np.random.default_rng(0).permutation(longest.ravel()).reshape(-1, LANES)
    assert np.ptp(longest, axis=1).mean() < 0.02 * np.ptp(shuffled, axis=1).mean()


def test_steps_come_in_random_order_of_length(lengths: np.ndarray) -> None:
    made = plan.plan_epoch(lengths, 0, 0, BUDGET, LANES)
    longest = np.array([lengths[made.step_items(step)].max() for step in range(made.num_steps)])
    assert abs(np.corrcoef(longest[:-1], longest[1:])[0, 1]) < 0.2


def test_lanes_take_turns_with_the_longest_of_a_step(lengths: np.ndarray) -> None:
    made = plan.plan_epoch(lengths, 0, 0, BUDGET, LANES)
    longest = np.array([lengths[items].max() for items in micro_batches(made)]).reshape(-1, LANES)
    longest = longest[(longest == longest.max(axis=1, keepdims=True)).sum(axis=1) == 1]  # steps with one longest
    shares = np.bincount(longest.argmax(axis=1), minlength=LANES) / len(longest)
    assert len(longest) > 50
    assert shares.min() > 0.1


def test_at_most_lanes_minus_one_of_the_largest_are_halved() -> None:
    lengths = np.full(70, 10)
    made = plan.plan_epoch(lengths, 0, 0, 100, 4)  # 7 micro-batches of 10 items: one more is needed
    assert sorted(len(items) for items in micro_batches(made)) == [5, 5] + [10] * 6


def test_few_items_still_fill_the_lanes() -> None:
    made = plan.plan_epoch(np.array([9, 8, 7, 6]), 0, 0, 1000, 4)
    assert [len(items) for items in micro_batches(made)] == [1] * 4


def test_fewer_items_than_lanes_is_an_error() -> None:
    with pytest.raises(UserError, match="3 items cannot fill 4 lanes"):
        plan.check(np.array([9, 8, 7]), 1000, 4)


def test_an_item_above_the_budget_is_named() -> None:
    with pytest.raises(UserError, match="item 'utt-b' has 101 padded frames, above the micro-batch budget of 100"):
        plan.check(np.array([9, 101, 7]), 100, 2, ["utt-a", "utt-b", "utt-c"])
    plan.check(np.array([9, 100, 7]), 100, 2, ["utt-a", "utt-b", "utt-c"])


def test_items_that_cannot_be_cut_into_a_multiple_of_the_lanes_are_an_error() -> None:
    with pytest.raises(UserError, match=r"5 items fill 5 micro-batches.*multiple of 4 lanes; raise the budget"):
        plan.plan_epoch(np.full(5, 60), 0, 0, 100, 4)


def test_the_fingerprint_follows_everything_but_the_epoch(lengths: np.ndarray) -> None:
    same = plan.fingerprint(lengths, 1, BUDGET, LANES)
    assert same == plan.fingerprint(lengths.astype(np.int32), 1, BUDGET, LANES)
    longer = lengths.copy()
    longer[17] += 1
    others = [
        plan.fingerprint(lengths, 2, BUDGET, LANES),
        plan.fingerprint(lengths, 1, BUDGET + 1, LANES),
        plan.fingerprint(lengths, 1, BUDGET, LANES + 1),
        plan.fingerprint(lengths[:-1], 1, BUDGET, LANES),
        plan.fingerprint(longer, 1, BUDGET, LANES),
    ]
    assert len({same, *others}) == 6


# ---- mixtures of groups

GROUPS = [np.arange(0, 40), np.arange(40, 53), np.arange(53, 253)]
WEIGHTS = [2.0, 1.0, 0.5]


def parts(mixed: np.ndarray) -> list[list[int]]:
    """What is of each group, in order."""
    return [mixed[np.isin(mixed, group)].tolist() for group in GROUPS]


@pytest.mark.parametrize("weights", [WEIGHTS, [1, 1, 1], [0.01, 5, 3], [40, 13, 200]])
def test_a_mixture_s_shares_hold_to_one_item(weights: list[float]) -> None:
    total = min(len(group) * sum(weights) / weight for group, weight in zip(GROUPS, weights, strict=True))
    for epoch in range(4):
        sizes = [len(part) for part in parts(plan.mix(GROUPS, weights, 0, epoch))]
        for size, weight in zip(sizes, weights, strict=True):
            assert abs(size - weight / sum(weights) * total) < 1
        assert any(size == len(group) for size, group in zip(sizes, GROUPS, strict=True))


def test_a_mixture_goes_through_a_group_before_it_comes_again() -> None:
    streams = [[], [], []]  # type: ignore[var-annotated]
    for epoch in range(45):
        for stream, part in zip(streams, parts(plan.mix(GROUPS, WEIGHTS, 0, epoch)), strict=True):
            stream.extend(part)
    for stream, group in zip(streams, GROUPS, strict=True):
        rounds = [stream[at : at + len(group)] for at in range(0, len(stream), len(group))]
        assert len(rounds) > 1
        for one in rounds[:-1]:
            assert sorted(one) == group.tolist()
        assert len({tuple(one) for one in rounds[:-1]}) == len(rounds) - 1  # each in an order of its own
        assert len(set(rounds[-1])) == len(rounds[-1])


def test_a_mixture_is_a_pure_function() -> None:
    one = [plan.mix(GROUPS, WEIGHTS, 3, epoch).tolist() for epoch in range(5)]
    np.random.seed(1)
    assert [plan.mix(GROUPS, WEIGHTS, 3, epoch).tolist() for epoch in reversed(range(5))] == one[::-1]
    assert len({tuple(mixed) for mixed in one}) == 5
    assert plan.mix(GROUPS, WEIGHTS, 4, 0).tolist() != one[0]
    assert plan.mix(GROUPS, [4 * weight for weight in WEIGHTS], 3, 2).tolist() == one[2]


def test_groups_of_one_size_come_in_orders_of_their_own() -> None:
    one, other = parts_of_two = np.split(plan.mix([np.arange(50), np.arange(50, 100)], [1, 1], 0, 0), 2)
    assert [len(part) for part in parts_of_two] == [50, 50]
    assert one.tolist() != (other - 50).tolist()


def test_a_rare_group_has_one_item_an_epoch() -> None:
    mixed = [plan.mix([np.arange(100), np.array([100, 101])], [1, 1e-6], 0, epoch) for epoch in range(4)]
    assert [len(one) for one in mixed] == [101] * 4
    assert sorted(one.max() for one in mixed) == [100, 100, 101, 101]


def test_one_group_is_gone_through_once_an_epoch() -> None:
    for epoch in range(3):
        assert sorted(plan.mix([np.array([4, 7, 9])], [0.3], 1, epoch).tolist()) == [4, 7, 9]


def test_the_unit_of_a_budget_is_named() -> None:
    with pytest.raises(UserError, match=r"has 101 padded tokens.*raise batch\.tokens"):
        plan.check(np.array([9, 101]), 100, 2, ["utt-a", "utt-b"], unit="tokens")


# ---- the plan item by item, as it once was made: recorded figures of training depend on these very plans


def halved(bounds: list[int], lengths: np.ndarray, lanes: int) -> np.ndarray | None:
    runs = [(-int(lengths[a:b].max()) * (b - a), a, b) for a, b in itertools.pairwise(bounds)]
    heapq.heapify(runs)
    settled = []
    while (len(runs) + len(settled)) % lanes:
        if not runs:
            return None
        cost, begin, end = heapq.heappop(runs)
        if end - begin == 1:
            settled.append((cost, begin, end))
            continue
        middle = (begin + end) // 2
        for a, b in ((begin, middle), (middle, end)):
            heapq.heappush(runs, (-int(lengths[a:b].max()) * (b - a), a, b))
    return np.array([*sorted(begin for _, begin, _ in runs + settled), len(lengths)])


def item_by_item(
    lengths: np.ndarray, seed: int, epoch: int, budget: int, lanes: int, window: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Items and bounds; None where the lanes cannot be filled."""
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    order = rng.permutation(len(lengths))
    order = order[np.lexsort((lengths[order], np.arange(len(order)) // window))]
    pieces = halved(greedy(lengths[order], budget), lengths[order], lanes)
    if pieces is None:
        return None
    longest = np.maximum.reduceat(lengths[order], pieces[:-1])
    ranked = np.argsort(longest, kind="stable").reshape(-1, lanes)
    chosen = rng.permuted(ranked, axis=1)[rng.permutation(len(ranked))].ravel()
    runs = [order[pieces[m] : pieces[m + 1]] for m in chosen]
    return np.concatenate(runs), np.cumsum([0, *map(len, runs)])


@pytest.mark.parametrize("window", [1, 16, 100, plan.WINDOW_ITEMS])
@pytest.mark.parametrize("longest", [2, 30, 300, 70_000])
def test_plans_of_up_to_16384_items_are_those_made_item_by_item(window: int, longest: int) -> None:
    refused = 0
    for case in range(12):
        rng = np.random.default_rng([window, longest, case])
        lengths = rng.integers(1, longest, size=[16384, 7000, *[int(rng.integers(1, 200))] * 10][case])
        lanes, budget = int(rng.choice([1, 2, 3, 8, 24])), int(rng.integers(longest, 40 * longest))
        expected = item_by_item(lengths, 3, case, budget, lanes, window)
        if expected is None:
            refused += 1
            with pytest.raises(UserError, match="raise the budget"):
                plan.plan_epoch(lengths, 3, case, budget, lanes, window)
            continue
        made = plan.plan_epoch(lengths, 3, case, budget, lanes, window)
        assert np.array_equal(made.items, expected[0])
        assert np.array_equal(made.bounds, expected[1])
    assert refused < 8


@pytest.mark.parametrize(("window", "block"), [(16, 16384), (1000, 17000), (20_000, 20_000)])
def test_a_larger_set_is_cut_greedily_in_blocks_of_whole_windows(window: int, block: int) -> None:
    """One lane halves nothing: the micro-batches are the greedy runs of each block, each block on its own."""
    lengths = np.random.default_rng(window).integers(4, 200, size=45_000)
    order = np.random.Generator(np.random.Philox(key=[0, 0])).permutation(len(lengths))
    order = order[np.lexsort((lengths[order], np.arange(len(order)) // window))]
    expected = set()
    for begin in range(0, len(order), block):
        items = order[begin : begin + block]
        expected |= {tuple(items[a:b]) for a, b in itertools.pairwise(greedy(lengths[items], BUDGET))}
    made = plan.plan_epoch(lengths, 0, 0, BUDGET, 1, window)
    assert {tuple(items) for items in micro_batches(made)} == expected
