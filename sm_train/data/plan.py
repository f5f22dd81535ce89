"""The batch plan: which utterances go into which micro-batch of which step, as a pure function of its arguments.

An epoch permutes the items, sorts them inside windows, cuts micro-batches under the budget, halves the largest ones
until their number is a multiple of G, makes each step of G neighbours in length, and shuffles the steps. Any process
can rebuild any epoch from (lengths, seed, epoch, budget, G), so a position in training is two integers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sm_train.data.cuts import BLOCK_ITEMS, cut, halve
from sm_train.errors import UserError

WINDOW_ITEMS = 4096
SHARDS_PER_WINDOW = 16


@dataclass(frozen=True, slots=True)
class EpochPlan:
    """One epoch: ``items[bounds[m]:bounds[m + 1]]`` are micro-batch m; step s has those from sG to sG + G - 1."""

    items: NDArray[np.int64]
    bounds: NDArray[np.int64]
    lanes: int

    @property
    def num_steps(self) -> int:
        """Optimizer steps in this epoch."""
        return (len(self.bounds) - 1) // self.lanes

    def micro_batch(self, step: int, lane: int) -> NDArray[np.int64]:
        """The items of one lane of one step."""
        m = step * self.lanes + lane
        return self.items[self.bounds[m] : self.bounds[m + 1]]

    def step_items(self, step: int) -> NDArray[np.int64]:
        """The items of all lanes of one step."""
        return self.items[self.bounds[step * self.lanes] : self.bounds[(step + 1) * self.lanes]]


def check(
    lengths: NDArray[np.int64], budget: int, lanes: int, names: list[str] | None = None, unit: str = "frames"
) -> None:
    """Refuse what cannot be planned.

    Raises:
        UserError: an item above the budget, or fewer items than lanes.
    """
    if len(lengths) < lanes:
        raise UserError(f"{len(lengths)} items cannot fill {lanes} lanes; lower the number of lanes or add data")
    longest = int(np.argmax(lengths))
    if lengths[longest] > budget:
        name = repr(names[longest]) if names else f"number {longest}"
        raise UserError(
            f"item {name} has {int(lengths[longest])} padded {unit}, above the micro-batch budget of {budget}; "
            f"raise batch.{unit}, or lower max_duration_s in precompute"
        )


def plan_epoch(
    lengths: NDArray[np.int64], seed: int, epoch: int, budget: int, lanes: int, window: int = WINDOW_ITEMS
) -> EpochPlan:
    """Plan one epoch.

    Args:
        lengths: what each item costs (frames, tokens; 1 for a budget in samples) [N].
        budget: the most that count times longest of a micro-batch may reach.
        lanes: G, micro-batches in a step.
        window: items that are sorted together; a smaller one mixes lengths more and pads more.

    Returns:
        A plan that holds each item exactly once.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    order = _sort_in_windows(lengths, rng.permutation(len(lengths)), window)
    ordered = lengths[order]
    block = -(-BLOCK_ITEMS // window) * window
    ends = np.append(np.arange(block, len(order), block), len(order))
    pieces = _halve_to_multiple(cut(ordered, budget, ends), ordered, lanes)
    # Neighbours in length share a step, so that no lane waits long for another.
    longest = np.maximum.reduceat(ordered, pieces[:-1])
    ranked = np.argsort(longest, kind="stable").reshape(-1, lanes)
    micro_batches = rng.permuted(ranked, axis=1)[rng.permutation(len(ranked))].ravel()
    sizes = np.diff(pieces)[micro_batches]
    bounds = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    starts = np.repeat(pieces[:-1][micro_batches] - bounds[:-1], sizes)
    return EpochPlan(order[starts + np.arange(len(order))], bounds, lanes)


def _sort_in_windows(lengths: NDArray[np.int64], order: NDArray[np.int64], window: int) -> NDArray[np.int64]:
    """``order``, sorted by length inside each window; items of one length keep their order."""
    whole = len(order) // window * window
    pieces = [order[:whole].reshape(-1, window), order[None, whole:]]
    dtype = np.uint16 if lengths.max() < 2**16 else np.int64  # numpy sorts 16 bits by radix
    ordered = []
    for piece in pieces:
        within = np.argsort(lengths[piece].astype(dtype), axis=1, kind="stable")
        ordered.append(np.take_along_axis(piece, within, axis=1).ravel())
    return np.concatenate(ordered)


def _halve_to_multiple(bounds: NDArray[np.int64], lengths: NDArray[np.int64], lanes: int) -> NDArray[np.int64]:
    """Halve the largest runs until their number is a multiple of ``lanes``.

    Raises:
        UserError: there are too few items for that.
    """
    halved = halve(bounds, lengths, -(len(bounds) - 1) % lanes)
    if halved is None:
        raise UserError(
            f"{len(lengths)} items fill {len(bounds) - 1} micro-batches, which cannot be cut into a multiple of "
            f"{lanes} lanes; raise the budget of a micro-batch, lower batch.lanes or add data"
        )
    return halved


def mix(
    groups: Sequence[NDArray[np.int64]], weights: Sequence[float], seed: int, epoch: int, total: float = 0
) -> NDArray[np.int64]:
    """The items of one epoch of several groups, each group's share of the items being its weight's.

    An epoch has ``total`` items, to one a group; with 0 it ends where the group that is scarcest for its weight has
    been gone through once. Every group is an endless stream of permutations of itself, and an epoch takes the next
    piece of it: no item comes again before its group is through.
    """
    shares = np.array(weights, np.float64) / np.sum(weights)
    total = total or min(len(group) / share for group, share in zip(groups, shares, strict=True))
    taken = []
    for number, (group, share) in enumerate(zip(groups, shares, strict=True)):
        size = max(int(share * total + 1e-6), 1)
        first, last = epoch * size, (epoch + 1) * size
        rounds = range(first // len(group), (last - 1) // len(group) + 1)
        stream = [np.random.default_rng([seed, number, r]).permutation(group) for r in rounds]
        offset = rounds.start * len(group)
        taken.append(np.concatenate(stream)[first - offset : last - offset])
    return np.concatenate(taken)


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run is: the next step to take."""

    epoch: int
    step: int


class Planner:
    """Plans any epoch of some items: a pure function of what it is made with.

    Args:
        lengths: what each item costs of a micro-batch's budget [N].
        of_epoch: gives the items that an epoch goes through, equally many in every epoch; None for all, each once.
        names, unit: the items' ids and what lengths are counted in, for messages.
        shard_of: the shard that each item lies in, so that lanes have windows of their own (:mod:`sm_train.data.lanes`:
            for a set that is far away) [N]; None to sort items of all shards together in windows of ``window``.
        shards_per_window: the fewest shards in a lane's window.

    Raises:
        UserError: an item above the budget, or fewer items than lanes.
    """

    def __init__(
        self, lengths: NDArray[np.int64], seed: int, budget: int, lanes: int, window: int = WINDOW_ITEMS,
        of_epoch: Callable[[int], NDArray[np.int64] | None] = lambda epoch: None,
        names: list[str] | None = None, unit: str = "frames",
        shard_of: NDArray[np.int64] | None = None, shards_per_window: int = SHARDS_PER_WINDOW,
    ) -> None:  # fmt: skip
        check(lengths, budget, lanes, names, unit)
        self.lengths, self.lanes, self.of_epoch = lengths, lanes, of_epoch
        self._sizes = (budget, lanes, window)
        self._shard_of, self._shards_per_window = shard_of, shards_per_window
        self.seed = seed
        self._last: tuple[int, EpochPlan] | None = None
        self.fingerprint = fingerprint(lengths, seed, budget, lanes, window)
        if shard_of is not None:
            self.fingerprint = fingerprint(shard_of, seed, shards_per_window, lanes) + self.fingerprint

    @property
    def has_lane_windows(self) -> bool:
        """Whether lanes keep to shards of their own."""
        return self._shard_of is not None

    def epoch(self, number: int) -> EpochPlan:
        """The plan of one epoch; the last one asked for is kept."""
        last = self._last  # another thread may plan the next epoch meanwhile
        if last is None or last[0] != number:
            chosen = self.of_epoch(number)
            made = self._plan(slice(None) if chosen is None else chosen, number)
            self._last = last = number, made if chosen is None else replace(made, items=chosen[made.items])
        return last[1]

    def _plan(self, chosen: NDArray[np.int64] | slice, epoch: int) -> EpochPlan:
        if self._shard_of is None:
            return plan_epoch(self.lengths[chosen], self.seed, epoch, *self._sizes)
        from sm_train.data.lanes import plan_lanes  # which falls back on plan_epoch

        budget, lanes, _ = self._sizes
        of_chosen = self.lengths[chosen], self._shard_of[chosen]
        return plan_lanes(*of_chosen, self.seed, epoch, budget, lanes, self._shards_per_window)


def fingerprint(lengths: NDArray[np.int64], seed: int, budget: int, lanes: int, window: int = WINDOW_ITEMS) -> str:
    """A hash of everything a plan follows from but the epoch."""
    import xxhash

    head = np.array([seed, budget, lanes, window, len(lengths)], np.int64)
    return str(xxhash.xxh3_64_hexdigest(head.tobytes() + lengths.astype(np.int64).tobytes()))
