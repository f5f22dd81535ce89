"""Measure this machine's rates: the plan's own stages, for real and for a short while.

    python -m tools.plan_capacity.calibrate CONFIG out=rates.json [gpus=2] [plan keys ...]

A part of the plan's corpus is encoded, given targets, trained on with three sizes of micro-batch in each stage, and
answered about. A plan with rates=rates.json then predicts with what was measured.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from sm_train import config, files, precompute
from sm_train.data import manifest
from sm_train.encoding.decode import DecodeConfig
from sm_train.encoding.decoders import DecodePool
from sm_train.errors import UserError, run_command
from sm_train.models import targets, tasks
from sm_train.models.speech import SpeechEncoder
from tools.plan_capacity import answering, jobs, rates, readings
from tools.plan_capacity.corpus import read
from tools.plan_capacity.jobs import Place, Sizes
from tools.plan_capacity.rates import Rate
from tools.plan_capacity.readings import Trained
from tools.plan_capacity.settings import PlanConfig

_FEW = 8


@dataclass(frozen=True)
class CalibrateConfig(PlanConfig):
    """A plan, and how long its rates are measured."""

    utterances: int = config.key(700, "training utterances to encode")
    held_out: int = config.key(32, "utterances of each split to validate and to evaluate on")
    steps: int = config.key(16, "steps of pretraining with whole micro-batches; half as many with smaller ones")
    tune_steps: int = config.key(12, "the same of tuning")
    folder: str | None = config.key(None, "folder to work in, kept; null: one that is removed")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("utterances", 64), ("held_out", 4), ("steps", 12), ("tune_steps", 12)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.rates:
            raise ValueError("rates are what is measured here; leave rates out")


Found = dict[str, tuple[float, str]]
"""Values with their units, by the names of rates."""


def encoding(place: Place) -> Found:
    """The whole command, its own log, and a decoder alone."""
    wall_s, found = jobs.timed(place, "precompute"), readings.precomputed(place.shards)
    corpus, gpus = read(place.cfg, place.shapes), place.cfg.gpus_of("precompute")
    encode_x, decode_x = found["audio_s"] / found["encode_s"], _decoding_x(place)
    workers = gpus * place.shapes.precompute.decode_workers
    busy_s = corpus.all_s * max(1 / (gpus * encode_x), 1 / (workers * decode_x))
    written = jobs.bytes_of(place.shards) / 1e6 * found["committed"] / corpus.num_all
    return {
        "encode_x": (encode_x, "x real time"),
        "decode_x": (decode_x, "x real time a CPU thread"),
        "write_mb_s": (written / found["write_s"], "MB/s a writer"),
        "precompute_start_s": (max(wall_s - busy_s, 0.0), "s"),
    }


def _decoding_x(place: Place) -> float:
    cfg = place.shapes.precompute
    encoder = SpeechEncoder(cfg.encoder)
    decoding = DecodeConfig(manifest.root_of(cfg.manifest), cfg.max_duration_s, cfg.silence_dbfs,
                            encoder.shortest_samples, encoder.longest_samples, encoder.inputs.to_json())  # fmt: skip
    utterances = manifest.read_manifest(cfg.manifest)[:300]
    pool = DecodePool(decoding, 1, cfg.decode_timeout_s)
    try:
        pool.submit(utterances[0]).result()
        begun = time.perf_counter()
        for future in [pool.submit(u) for u in utterances]:
            future.result()
        return sum(u.duration_s for u in utterances) / (time.perf_counter() - begun)
    finally:
        pool.close(abandon=True)


def targeting(place: Place, few: Place) -> Found:
    """The whole command; targets and tasks of few and of all utterances in this process."""
    wall_s = jobs.timed(place, "retarget")
    small = replace(few.shapes.precompute, targets=[])
    precompute.run(small, precompute.in_this_process)
    (target,) = (t for t in place.shapes.precompute.targets if t.name == place.shapes.pretrain.target)
    seconds = []
    for one, name in ((few, "warm"), (few, "few"), (place, "again")):
        begun = time.perf_counter()
        targets.build(replace(target, name=name), one.shards)
        tasks.build(one.shards, name, [Path(str(one.cfg.corpus.instructions))])
        seconds.append(time.perf_counter() - begun)
    counts = [len(manifest.read_manifest(one.shapes.precompute.manifest)) for one in (few, place)]
    each_s = max(seconds[2] - seconds[1], 0.0) / (counts[1] - counts[0])
    return {
        "target_s": (each_s, "s an utterance, its tasks included"),
        "retarget_start_s": (max(wall_s - counts[1] * each_s, 0.0), "s"),
    }


def training(place: Place, stage: str, steps: int, unit: str) -> Found:
    """Three runs, with whole, halved and quartered micro-batches; the first validates and saves in its midst."""
    name = unit if stage == "pretrain" or not place.shapes.tune.batch.samples else "samples"
    budget = place.shapes.pretrain.batch.frames if stage == "pretrain" else place.shapes.tune.batch.budget
    runs: list[tuple[Trained, float]] = []
    for number, (share, taken) in enumerate(((1, steps), (2, steps // 2), (4, steps // 2))):
        own = [f"run={place.folder}/{stage}-{number}", f"batch.{name}={max(budget // share, 1)}", f"loop.steps={taken}"]
        every = taken // 2 if number == 0 else 0
        own += [f"loop.save_every={every or taken}", f"loop.validate_every={every}", "loop.log_every=1000"]
        one = jobs.with_words(place, {stage: own})
        wall_s = jobs.timed(one, stage)
        runs.append((readings.trained(one, stage, one.folder / f"{stage}-{number}"), wall_s))
    base, slope = readings.through([(run.padded, run.seconds) for run, _ in runs])
    starts = []
    for run, wall_s in runs[1:]:  # those without a validation
        starts.append(wall_s - run.num_steps * float(run.seconds.mean()))
    first = runs[0][0]
    return {
        f"{stage}_start_s": (max(float(np.mean(starts)), 0.0), "s"),
        f"{stage}_step_s": (base, "s a step"),
        f"{stage}_{'frame' if stage == 'pretrain' else 'token'}_s": (slope, f"s a padded {unit[:-1]} of a rank"),
        "valid": (first.between_s, "s"),
        "save_s": (first.save_s, "s"),
    }


def evaluating(place: Place) -> Found:
    """The whole command, and its parts in this process."""
    wall_s, found = jobs.timed(place, "evaluate"), answering.measure(place)
    corpus, texts = read(place.cfg, place.shapes), 1 + (place.shapes.evaluate.cascade is not None)
    questions = corpus.num_test * corpus.tasks
    parts_s = texts * found.topline_s + found.mapped_s + corpus.num_test * found.hear_s
    parts_s += (texts + 1) * questions * found.score_s
    return {
        "evaluate_start_s": (max(wall_s - parts_s, 0.0), "s"),
        "hear_s": (found.hear_s, "s an utterance and mapper"),
        "answer_s": (found.answer_s, "s an answer"),
        "cut_answer_s": (found.cut_answer_s, "s an answer of max_new_tokens"),
        "score_s": (found.score_s, "s a hypothesis"),
    }


def measure(cfg: CalibrateConfig, folder: Path) -> Found:
    """All rates, stage by stage."""
    begun = time.perf_counter()

    def said(name: str, work: Callable[[], Found]) -> Found:
        found = work()
        print(f"{time.perf_counter() - begun:6.1f} s  {name}", flush=True)
        return found

    place = jobs.carve(cfg, folder / "all", Sizes(cfg.utterances, cfg.held_out, cfg.held_out))
    few = jobs.carve(cfg, folder / "few", Sizes(_FEW, 1, 1))
    found = said("precompute", lambda: encoding(place))
    found |= said("targets", lambda: targeting(place, few))
    stage1 = said("pretrain", lambda: training(place, "pretrain", cfg.steps, "frames"))
    place = jobs.with_words(
        place, {"tune": [f"mapper={place.folder}/pretrain-0"], "evaluate": [f"run={place.folder}/pretrain-0"]}
    )
    stage2 = said("tune", lambda: training(place, "tune", cfg.tune_steps, "tokens"))
    corpus, gpus = read(place.cfg, place.shapes), place.cfg.gpus_of("pretrain")
    valid_s = max(stage1.pop("valid")[0], 1e-6)
    found["pretrain_valid_x"] = corpus.valid_s / valid_s / gpus, "x real time a process"
    found["tune_valid_s"] = stage2.pop("valid")[0] * gpus / max(corpus.num_valid, 1), "s an utterance"
    return {**found, **stage2, **stage1, **said("evaluate", lambda: evaluating(place))}


def main(argv: list[str]) -> None:
    cfg = config.load(CalibrateConfig, argv, "tools.plan_capacity.calibrate")
    if not cfg.out:
        raise UserError("out is not set; name the file for the rates, as out=rates.json")
    load, begun = jobs.load(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="calibrate-") as scratch:
        folder = Path(cfg.folder or scratch).resolve()
        found = measure(cfg, folder)
        of_plan = rates.facts(cfg, jobs.shapes.read(cfg))
    loads = f"load {load:.1f} before, {jobs.load():.1f} after, {os.cpu_count()} CPUs"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    kept = {name: asdict(Rate(*found[name], "calibrated", f"{device}, {loads}")) for name in rates.NAMES}
    files.write_json(Path(cfg.out), {"schema": rates.SCHEMA, "facts": of_plan, "rates": kept})
    for name in rates.NAMES:
        print(f"{name:20} {kept[name]['value']:10.4g} {kept[name]['unit']}")
    print(f"{cfg.out}: measured in {time.perf_counter() - begun:.0f} s; {loads}")


if __name__ == "__main__":
    run_command(main)
