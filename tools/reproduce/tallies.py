"""Figures over seeds and utterances, from hypotheses files alone.

Shape letters: U utterances, K statistics of a metric, R resamples, S seeds.

A row's figure is the mean over its seeds. Seeds and utterances are crossed, as every seed answers the same utterances:
a resample draws S seeds with replacement, then U utterances, the same for all seeds, and takes the mean of the drawn
seeds' metrics over the drawn utterances. All rows share the draws, so that a difference of two rows on the same
utterances is paired in both.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sm_train.errors import UserError
from sm_train.scoring.language import Languages
from sm_train.scoring.scores import Hypothesis, read_hypotheses, utterance_sums

RESAMPLES = 1000
SEED = 20417
NO_LLM = ", no LLM"

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Place:
    """A column of a table: a metric on a split, asked with a group of prompts."""

    metric: str
    """One of :data:`tools.reproduce.world.METRICS`."""
    split: str
    prompts: str


@dataclass(frozen=True)
class Tally:
    """One seed's figure, and the same over each resample of utterances."""

    value: float
    resampled_R: Floats
    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds, or a difference of two, with a 95% percentile interval."""

    value: float
    low: float
    high: float
    seeds: tuple[int, ...]
    """One seed, or none in common: the interval is over utterances alone."""
    count: int
    """Utterances."""


BySeed = Mapping[int, Tally]


def read(
    folder: Path, normaliser: str, languages: Languages | None, metrics: Sequence[str]
) -> dict[str, dict[Place, Tally]]:
    """The tallies of an evaluation's hypotheses, by system; a system's transcripts without the LLM are its own.

    Raises:
        UserError: the hypotheses cannot be read or scored.
    """
    groups: dict[tuple[str, Place], list[Hypothesis]] = {}
    for item in read_hypotheses(folder / "hypotheses.jsonl"):
        name = item.system.removesuffix(NO_LLM)
        for metric in metrics:
            if _is_of(metric, item):
                groups.setdefault((name, Place(metric, item.split, item.group)), []).append(item)
    found: dict[str, dict[Place, Tally]] = {}
    for (system, place), items in groups.items():
        metric = place.metric.removesuffix(NO_LLM).partition(" ")[2]
        ids, stats_UK, compute = utterance_sums(items, metric, normaliser, languages)
        sums_RK = draws(len(ids)) @ stats_UK
        tally = Tally(compute(stats_UK.sum(axis=0)), np.array([compute(sums_K) for sums_K in sums_RK]), tuple(ids))
        found.setdefault(system, {})[place] = tally
    return found


def _is_of(metric: str, item: Hypothesis) -> bool:
    """Whether a column is about an answer: "st-fr chrF", "st in language" (of both), "asr WER, no LLM"."""
    task, _, language = metric.partition(" ")[0].partition("-")
    is_alone = item.system.endswith(NO_LLM)
    return item.task == task and language in ("", item.target_lang) and is_alone == metric.endswith(NO_LLM)


@functools.lru_cache(maxsize=8)
def draws(num_utterances: int) -> Floats:
    """How often each utterance is drawn in each resample [R, U]."""
    drawn = np.random.default_rng(SEED).integers(num_utterances, size=(RESAMPLES, num_utterances))
    return np.stack([np.bincount(row, minlength=num_utterances) for row in drawn]).astype(np.float64)


@functools.lru_cache(maxsize=8)
def seed_draws(num_seeds: int) -> NDArray[np.intp]:
    """The seeds of each resample [R, S], by place."""
    return np.random.default_rng(SEED + 1).integers(num_seeds, size=(RESAMPLES, num_seeds))


def over_seeds(tallies: BySeed) -> Interval:
    """The mean over seeds, drawn with replacement together with the utterances."""
    seeds = sorted(tallies)
    _require_same_utterances(list(tallies.values()))
    values = [tallies[seed].value for seed in seeds]
    return _interval(float(np.mean(values)), np.stack([tallies[seed].resampled_R for seed in seeds]), tallies, seeds)


def average(several: Sequence[BySeed]) -> BySeed:
    """The mean of several columns of one row, as of both languages: resamples are averaged, not intervals."""
    return {
        seed: Tally(
            float(np.mean([one[seed].value for one in several])),
            np.mean([one[seed].resampled_R for one in several], axis=0),
            several[0][seed].ids,
        )
        for seed in sorted(set(several[0]).intersection(*several))
    }


def difference(a: BySeed, b: BySeed) -> Interval | None:
    """a - b over the seeds that both have; a reference, whose seed is -1, stands beside each. None without any."""
    seeds = sorted(set(a) & set(b)) or sorted(set(a) if -1 in b else set(b) if -1 in a else ())
    if not seeds:
        return None
    pairs = [(a.get(seed, a.get(-1)), b.get(seed, b.get(-1))) for seed in seeds]
    differences = {
        seed: Tally(one.value - other.value, one.resampled_R - other.resampled_R, one.ids)
        for seed, (one, other) in zip(seeds, pairs, strict=True)
        if one and other
    }
    _require_same_utterances([tally for pair in pairs for tally in pair if tally])
    return over_seeds(differences)


def _interval(value: float, resampled_SR: Floats, tallies: BySeed, seeds: Sequence[int]) -> Interval:
    chosen_RS = seed_draws(len(seeds))
    means_R = np.take_along_axis(resampled_SR.T, chosen_RS, axis=1).mean(axis=1)
    low, high = np.percentile(means_R, [2.5, 97.5])
    return Interval(value, float(low), float(high), tuple(seeds), len(tallies[seeds[0]].ids))


def _require_same_utterances(tallies: Sequence[Tally]) -> None:
    if len({tally.ids for tally in tallies}) > 1:
        raise UserError("two evaluations are not about the same utterances; remove the older one and run again")
