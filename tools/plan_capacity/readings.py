"""What a real job's own files say of its speed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sm_train.data.batches import Items, SpeechItems
from sm_train.data.instructions import InstructionItems, Mixture
from sm_train.data.loader import plan_items
from sm_train.data.target_set import TargetSet
from sm_train.models.llm import TargetsLlm
from sm_train.prompts import read_prompts
from tools.plan_capacity.jobs import Place

_WARM = 2
"""First steps of a run that are not counted."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Trained:
    """A run's steps, one entry each."""

    padded: Floats
    """Frames or tokens of the rank that has most."""
    seconds: Floats
    """From step to step, logging included; without validations and saves."""
    between_s: float
    """A validation, on average; 0 if there was none inside the run."""
    save_s: float
    """A save's stall, on average."""
    num_steps: int


def fit(x: Floats, y: Floats) -> tuple[float, float]:
    """(base, slope) of y = base + slope x, by least squares; neither is below zero."""
    if np.ptp(x) > 0:
        slope, base = np.polyfit(x, y, 1)
        if slope > 0 and base >= 0:
            return float(base), float(slope)
        if slope <= 0:
            return float(y.mean()), 0.0
    return 0.0, float(y.sum() / x.sum())


def through(runs: Sequence[tuple[Floats, Floats]]) -> tuple[float, float]:
    """(base, slope) of y = base + slope x over several runs, so that the first run's mean is met.

    The first has the config's own micro-batches, which is what is predicted most; the others say how it changes.
    """
    slope = fit(*(np.concatenate([run[i] for run in runs]) for i in (0, 1)))[1]
    x, y = (float(values.mean()) for values in runs[0])
    base = max(y - slope * x, 0.0)
    return base, (y - base) / x


def trained(place: Place, stage: str, run: Path) -> Trained:
    """The steps of a run that is over, from its metrics.jsonl and the plan that it followed."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    padded, audio_s = _planned(place, stage, len(lines))
    elapsed = np.cumsum(audio_s) / np.array([3600 * line["audio_h_per_s"] for line in lines])
    seconds = np.diff(elapsed, prepend=0.0)
    # What happens behind a step's line, a validation or a save, is in the next one's.
    stops = [0.0] * len(lines)
    validations, saves = [], [float(line["checkpoint_s"]) for line in lines if "checkpoint_s" in line]
    for i, (before, line) in enumerate(itertools.pairwise(lines), start=1):
        stops[i] = float(line.get("checkpoint_s", 0.0))
        if "valid_wer" in before:
            validation_s = max(float(seconds[i]) - line["step_s"] - stops[i], 0.0)
            validations.append(validation_s)
            stops[i] += validation_s
    return Trained(
        padded[_WARM:], (seconds - stops)[_WARM:], float(np.mean(validations)) if validations else 0.0,
        float(np.mean(saves)) if saves else 0.0, len(lines),
    )  # fmt: skip


def _planned(place: Place, stage: str, count: int) -> tuple[Floats, Floats]:
    """Padded cost of the rank that has most, and seconds of audio, of the first steps."""
    cfg: Any = place.shapes.pretrain if stage == "pretrain" else place.shapes.tune
    ranks, batch = place.cfg.gpus_of(stage), cfg.batch
    speech = SpeechItems(place.shards, TargetSet(place.shards, cfg.target), cfg.splits)
    items: Items = speech
    costs = speech.lengths
    if stage == "tune":
        chat, prompts = TargetsLlm(speech.targets, cfg.llm, cfg.llm_revision).chat(), read_prompts(Path(cfg.prompts))
        made = {unit: InstructionItems(speech, chat, Mixture(cfg.shares, prompts, "train", unit, 1000, cfg.seed))
                for unit in ("tokens", batch.unit)}  # fmt: skip
        items, costs = made[batch.unit], made["tokens"].lengths
    budget = batch.budget if stage == "tune" else batch.frames
    planner = plan_items(items, cfg.seed, budget, batch.lanes, batch.window)
    padded: list[float] = []
    audio_s: list[float] = []
    for epoch in itertools.count():
        for step in range(planner.epoch(epoch).num_steps):
            if len(padded) == count:
                return np.array(padded), np.array(audio_s)
            lanes = [planner.epoch(epoch).micro_batch(step, lane) for lane in range(batch.lanes)]
            sizes = np.array([int(costs[lane].max()) * len(lane) for lane in lanes])
            padded.append(float(sizes.reshape(-1, ranks).sum(axis=0).max()))
            audio_s.append(float(items.duration_s[np.concatenate(lanes)].sum()))
    raise AssertionError


def precomputed(shards: Path) -> dict[str, float]:
    """Sums of a precompute's log behind its first unit: seconds of audio, of encoding, of writing; units."""
    units = [json.loads(line) for line in (shards / "log.jsonl").read_text().splitlines()]
    units = [unit for unit in units if unit["event"] == "unit"]
    units = units[1:] or units  # the first warms the encoder up
    return {name: sum(unit[name] for unit in units) for name in ("audio_s", "encode_s", "write_s", "committed")}
