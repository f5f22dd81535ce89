"""How much of a micro-batch is padding, how long ranks wait for the slowest, and what a plan costs to make.

    python -m tools.bench.padding [key=value ...]

Our plans on the same lengths as lhotse's DynamicBucketingSampler (requirements-bench.lock) and transformers'
LengthGroupedSampler. Nothing is read or trained: a micro-batch costs its padded frames. --help lists the keys.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sm_train import config
from sm_train.data.lanes import plan_lanes
from sm_train.data.plan import EpochPlan, plan_epoch
from sm_train.errors import UserError, run_command

FRAMES_PER_S = 25
SHARD_ITEMS = 106
"""Utterances in a shard of 64 MiB: 12.4 s x 25 frames x 1024 x 2 bytes each."""
Batches = list[NDArray[np.int64]]


@dataclass(frozen=True)
class BenchConfig:
    """What is planned."""

    utterances: int = config.key(281_241, "number of utterances: 281,241 are LibriSpeech's 960 hours")
    budgets: list[int] = config.key([100, 200, 400, 800, 1600], "budgets of a micro-batch, padded seconds")
    lanes: list[int] = config.key([4, 8, 24], "numbers of lanes, or of ranks for the samplers")
    sizes: list[int] = config.key([1_000_000, 10_000_000], "numbers of items whose planning is timed")
    seed: int = config.key(0, "seed of lengths and plans")


def speech_lengths(count: int, seed: int) -> NDArray[np.int64]:
    """Lengths like LibriSpeech's, in frames: an assumed mixture, mean 12.4 s, longest 35 s.

    68% are normal around 14.6 s (deviation 1.3 s), 31.5% uniform from 1.4 to 13.5 s, 0.5% uniform from 16.5 to 35 s.
    """
    rng = np.random.default_rng(seed)
    kind = rng.random(count)
    short, long = rng.uniform(1.4, 13.5, count), rng.uniform(16.5, 35.0, count)
    seconds = np.where(kind < 0.68, rng.normal(14.6, 1.3, count), np.where(kind < 0.995, short, long))
    return (seconds.clip(1.3, 35.0) * FRAMES_PER_S).astype(np.int64)


@dataclass(frozen=True)
class Shares:
    """Of one epoch's micro-batches, G of which make a step."""

    filled: float
    """Real frames by padded frames."""
    of_budget: float
    """Padded frames of a micro-batch by its budget."""
    waiting: float
    """1 - mean / largest padded frames of a step's micro-batches, on average over the steps."""
    largest: float
    """The largest micro-batch's padded frames by the budget."""


def shares(lengths: NDArray[np.int64], batches: Batches, lanes: int, budget: int) -> Shares:
    """What of the batches' padded frames is real, and how unequal those of a step are."""
    costs = np.array([int(lengths[one].max()) * len(one) for one in batches])
    steps = costs[: len(costs) // lanes * lanes].reshape(-1, lanes)
    real = sum(int(lengths[one].sum()) for one in batches)
    waiting = 1 - float((steps.mean(axis=1) / steps.max(axis=1)).mean())
    return Shares(real / int(costs.sum()), float(costs.mean()) / budget, waiting, float(costs.max()) / budget)


def of_plan(made: EpochPlan) -> Batches:
    """All micro-batches of an epoch, step by step."""
    return np.split(made.items, made.bounds[1:-1])


def of_lhotse(lengths: NDArray[np.int64], budget: int, ranks: int, seed: int) -> Batches:
    """Micro-batches of lhotse's sampler with 30 buckets, as its ranks get them: the same limit on padded seconds."""
    from lhotse import CutSet, MonoCut
    from lhotse.dataset import DynamicBucketingSampler

    cuts = CutSet.from_cuts(
        MonoCut(id=str(i), start=0, duration=frames / FRAMES_PER_S, channel=0, supervisions=[])
        for i, frames in enumerate(lengths.tolist())
    )
    warnings.filterwarnings("ignore", message="You are using DynamicBucketingSampler with an eagerly read CutSet")
    sampler = DynamicBucketingSampler(
        cuts, max_duration=budget / FRAMES_PER_S, num_buckets=30, shuffle=True, seed=seed, world_size=ranks, rank=0
    )
    batches: Batches = []
    draw = sampler._next_batch  # one sampler draws the batches of all ranks, and gives back its own

    def recorded() -> CutSet:
        drawn = draw()
        batches.append(np.array([int(cut.id) for cut in drawn]))
        return drawn

    sampler._next_batch = recorded
    for _ in sampler:
        pass
    return batches


def of_transformers(lengths: NDArray[np.int64], budget: int, ranks: int, seed: int) -> Batches:
    """Batches of group_by_length: so many samples that the longest ones keep the budget."""
    import torch
    from transformers.trainer_pt_utils import LengthGroupedSampler

    size = budget // int(lengths.max())
    sampler = LengthGroupedSampler(size, lengths=lengths.tolist(), generator=torch.Generator().manual_seed(seed))
    items = np.array(list(sampler))
    return [items[i : i + size] for i in range(0, len(items), size)]


def of_ours(lengths: NDArray[np.int64], budget: int, lanes: int, seed: int) -> Batches:
    """The plan of a set that is at hand: windows of 4096 items."""
    return of_plan(plan_epoch(lengths, seed, 0, budget, lanes))


def of_lanes(lengths: NDArray[np.int64], budget: int, lanes: int, seed: int) -> Batches:
    """The plan of a set that is far away: windows of 16 shards a lane."""
    return of_plan(plan_lanes(lengths, np.arange(len(lengths)) // SHARD_ITEMS, seed, 0, budget, lanes))


SAMPLERS: dict[str, Callable[[NDArray[np.int64], int, int, int], Batches]] = {
    "ours": of_ours, "ours, lane windows": of_lanes,
    "lhotse DynamicBucketing": of_lhotse, "transformers group_by_length": of_transformers,
}  # fmt: skip


def padding_rows(cfg: BenchConfig) -> Iterator[str]:
    """One row of the table a budget and sampler; a sampler that is not installed is said to be missing, once."""
    lengths = speech_lengths(cfg.utterances, cfg.seed)
    yield f"| budget, s | plan | filled | of budget | both | largest |{''.join(f' wait, {g} |' for g in cfg.lanes)}"
    yield "|" + "---|" * (6 + len(cfg.lanes))
    missing: set[str] = set()
    for seconds in cfg.budgets:
        budget = seconds * FRAMES_PER_S
        for name, batches_of in SAMPLERS.items():
            try:
                found = [shares(lengths, batches_of(lengths, budget, g, cfg.seed), g, budget) for g in cfg.lanes]
            except ImportError as error:
                if name not in missing:
                    yield f"| | {name} | not run: {error}; pip install -r requirements-bench.lock |"
                missing.add(name)
                continue
            one = found[0]
            waits = "".join(f" {share.waiting:.1%} |" for share in found)
            both = one.filled * one.of_budget
            cells = [f"{one.filled:.1%}", f"{one.of_budget:.1%}", f"{both:.1%}", f"{one.largest:.2f}"]
            yield f"| {seconds} | {name} | {' | '.join(cells)} |{waits}"


def shard_rows(cfg: BenchConfig, budget_s: int = 400) -> Iterator[str]:
    """How many shards a lane reads from, by plan."""
    lengths = speech_lengths(cfg.utterances, cfg.seed)
    shard_of = np.arange(len(lengths)) // SHARD_ITEMS
    yield f"| lanes | plan | shards a lane reads in an epoch, of {shard_of[-1] + 1:,} | in 50 steps |"
    yield "|---|---|---|---|"
    for lanes in cfg.lanes:
        for name in ("ours", "ours, lane windows"):
            mine = SAMPLERS[name](lengths, budget_s * FRAMES_PER_S, lanes, cfg.seed)[::lanes]
            of_steps = [len(set(shard_of[np.concatenate(mine[i : i + 50])])) for i in range(0, len(mine), 50)]
            epoch = len(set(shard_of[np.concatenate(mine)]))
            yield f"| {lanes} | {name} | {epoch:,} | {int(np.median(of_steps)):,} |"


def time_rows(cfg: BenchConfig) -> Iterator[str]:
    """CPU seconds to plan one epoch of so many items, on one thread: the first time, and the second."""
    yield "| items | ours, CPU s: first, again | ours, lane windows, CPU s: first, again |\n|---|---|---|"
    for size in cfg.sizes:
        lengths = speech_lengths(size, cfg.seed)
        cells = []
        for plan_of in (of_plan_alone, of_lanes_alone):
            taken = []
            for _ in range(2):
                start = time.process_time()
                plan_of(lengths)
                taken.append(time.process_time() - start)
            cells.append(f"{taken[0]:.2f}, {taken[1]:.2f}")
        yield f"| {size:,} | {' | '.join(cells)} |"


def of_plan_alone(lengths: NDArray[np.int64]) -> EpochPlan:
    """A plan of 8 lanes and 400 padded seconds."""
    return plan_epoch(lengths, 0, 0, 400 * FRAMES_PER_S, 8)


def of_lanes_alone(lengths: NDArray[np.int64]) -> EpochPlan:
    """The same by lanes."""
    return plan_lanes(lengths, np.arange(len(lengths)) // SHARD_ITEMS, 0, 0, 400 * FRAMES_PER_S, 8)


def main(argv: list[str]) -> None:
    if any(word in ("-h", "--help") for word in argv):
        print(f"usage: python -m tools.bench.padding [key=value ...]\n\nkeys:\n{config.describe(BenchConfig)}")
        return
    if wrong := [word for word in argv if "=" not in word]:
        raise UserError(f"{wrong[0]!r} is not of the form key=value; --help lists the keys")
    words = [word.partition("=") for word in argv]
    cfg = config.from_mapping(BenchConfig, {k: json.loads(v) for k, _, v in words}, "tools.bench.padding")
    for rows in (padding_rows, shard_rows, time_rows):
        for row in rows(cfg):
            print(row, flush=True)
        print()


if __name__ == "__main__":
    run_command(main)
