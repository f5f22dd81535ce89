"""A whole plan: every stage for a corpus of some size, and storing features against encoding them in every epoch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tools.plan_capacity import corpus as corpora
from tools.plan_capacity import formulas, hardware, shapes, stages, storage, training
from tools.plan_capacity import rates as speeds
from tools.plan_capacity.corpus import Corpus
from tools.plan_capacity.goodput import GoodputConfig
from tools.plan_capacity.rates import Rates
from tools.plan_capacity.settings import STAGES, PlanConfig
from tools.plan_capacity.stages import Job, StagePlan

_PLANNED: dict[str, Callable[[Job], StagePlan]] = {
    "precompute": stages.precompute, "retarget": stages.retarget, "pretrain": training.pretrain, "tune": training.tune,
    "evaluate": stages.evaluate,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """Features kept, or made again in every epoch of pretraining."""

    epochs: float
    feature_bytes: float
    stored_gpu_hours: float
    """Of one pass of the encoder."""
    again_gpu_hours: float
    """Of a pass an epoch."""
    audio_read: float
    """Bytes of audio, read in every epoch."""
    feature_read: float
    """Bytes of features, read in every epoch."""
    storage_cost: float
    break_even_epochs: float
    slower: float
    """How many times a step takes that also encodes."""


@dataclass(frozen=True)
class Plan:
    """One corpus size."""

    hours: float
    stages: list[StagePlan]
    rates: Rates
    corpus: Corpus
    stored: Stored | None
    goodput: float
    """Of training, with faults."""
    mtbf_h: float

    @property
    def wall_s(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def gpu_hours(self) -> float:
        return sum(stage.gpu_hours for stage in self.stages)


def make(cfg: PlanConfig) -> list[Plan]:
    """A plan for every size asked for.

    Raises:
        UserError: what a person got wrong: a config, a GPU, lanes, an LLM that does not fit.
    """
    gpu, read = hardware.find(cfg.gpu), shapes.read(cfg)
    found = corpora.read(cfg, read)
    chosen = speeds.load(Path(cfg.rates), cfg, read) if cfg.rates else speeds.assumed(cfg, read, found, gpu)
    return [_one(Job(cfg, read, found.scaled(hours), chosen, gpu)) for hours in cfg.sizes]


def _one(job: Job) -> Plan:
    planned = [_PLANNED[name](job) for name in STAGES if name in job.cfg.stages]
    by_name = {stage.name: stage for stage in planned}
    stored = (
        _stored(job, by_name["precompute"], by_name["pretrain"]) if {"precompute", "pretrain"} <= set(by_name) else None
    )
    share, mtbf_h = _goodput(job)
    return Plan(job.corpus.train_s / 3600, planned, job.rates, job.corpus, stored, share, mtbf_h)


def _stored(job: Job, encoding: StagePlan, trained: StagePlan) -> Stored:
    cfg, corpus = job.cfg, job.corpus
    sizes = storage.features(corpus, job.shapes)
    one_pass = encoding.gpus * max(encoding.parts["encoding"], encoding.parts["decoding"]) / 3600
    training_s = sum(s for part, s in trained.parts.items() if part in ("compute", "update", "all-reduce"))
    hours_of_audio = training_s * trained.feed * trained.gpus / formulas.feature_bytes_per_s(
        job.shapes.frame_hz, job.shapes.width
    ) / 3600  # fmt: skip
    epochs = hours_of_audio * 3600 / corpus.train_s
    cost = sum(sizes.values()) / 1e12 * cfg.price_per_tb_month * cfg.months
    encode_s = hours_of_audio * 3600 / (trained.gpus * job.rates.encode_x.value)
    return Stored(
        epochs, sum(sizes.values()), one_pass, one_pass * epochs * corpus.train_s / corpus.all_s,
        corpus.audio_mb_per_hour * 1e6 * hours_of_audio, trained.feed * trained.gpus * training_s, cost,
        formulas.break_even_epochs(one_pass, cfg.price_per_gpu_hour, cost), 1 + encode_s / training_s,
    )  # fmt: skip


def _goodput(job: Job) -> tuple[float, float]:
    """Of training on all GPUs: by the exact formula, with the best interval between checkpoints."""
    faults = GoodputConfig(mtbf_s=job.cfg.mtbf_hours * 3600, gpus_per_node=job.cfg.gpus_per_node)
    mean_s = faults.mean_s(job.cfg.gpus)
    interval_s = formulas.best_interval_s(faults.stall_s, mean_s)
    share = formulas.goodput_exact(interval_s, faults.stall_s, faults.survived(mean_s), mean_s)
    return share, mean_s / 3600
