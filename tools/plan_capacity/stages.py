"""Stages: hours, bytes, traffic, and what they wait for; those of training are in training.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from sm_train.errors import UserError
from tools.plan_capacity import formulas, storage
from tools.plan_capacity.corpus import Corpus
from tools.plan_capacity.hardware import GIB, MARGIN, Gpu
from tools.plan_capacity.rates import Rates
from tools.plan_capacity.settings import PlanConfig
from tools.plan_capacity.shapes import Shapes


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes."""

    name: str
    gpus: int
    seconds: float
    parts: Mapping[str, float]
    """Seconds of the whole stage by what it does. Those of training add up; precompute's go on side by side."""
    limit: str
    """The part that is largest."""
    disk: Mapping[str, float]
    """Bytes that stay, by kind."""
    read: float
    """Bytes read from the storage, in all."""
    feed: float
    """Bytes a second that each GPU must be given."""
    notes: list[str] = field(default_factory=list)

    @property
    def gpu_hours(self) -> float:
        return 0.0 if self.name == "retarget" else self.gpus * self.seconds / 3600

    @property
    def disk_bytes(self) -> float:
        """What stays, without what is there only for a while."""
        return sum(size for kind, size in self.disk.items() if kind != "while saving")


@dataclass(frozen=True)
class Job:
    """What every stage is planned from."""

    cfg: PlanConfig
    shapes: Shapes
    corpus: Corpus
    rates: Rates
    gpu: Gpu


def largest(parts: Mapping[str, float]) -> str:
    """The part that takes longest."""
    return max(parts, key=lambda name: parts[name])


def nodes(cfg: PlanConfig, gpus: int) -> int:
    """Nodes that so many GPUs are in."""
    return math.ceil(gpus / cfg.gpus_per_node)


def storage_bytes_s(cfg: PlanConfig, gpus: int) -> tuple[float, str]:
    """Bytes a second from the storage to all GPUs of a stage, and what bounds them."""
    network = nodes(cfg, gpus) * cfg.network_gb_s * 1e9
    return (network, "network") if network < cfg.store_gb_s * 1e9 else (cfg.store_gb_s * 1e9, "storage")


def precompute(job: Job) -> StagePlan:
    """Encoding, decoding, reading and writing go on side by side: the slowest sets the pace."""
    cfg, corpus, gpus = job.cfg, job.corpus, job.cfg.gpus_of("precompute")
    disk = storage.features(corpus, job.shapes)
    audio = corpus.audio_mb_per_hour * 1e6 * corpus.all_s / 3600
    workers = job.shapes.precompute.decode_workers * gpus if cfg.gpu == "cpu" else cfg.vcpus_per_gpu * gpus
    outside, bound = storage_bytes_s(cfg, gpus)
    parts = {
        "encoding": corpus.all_s / (gpus * job.rates.encode_x.value),
        "decoding": corpus.all_s / (workers * job.rates.decode_x.value),
        "writing": sum(disk.values()) / (gpus * job.rates.write_mb_s.value * 1e6),
        f"{bound}, audio in": audio / outside,
        f"{bound}, features out": sum(disk.values()) / outside,
    }
    busy_s = max(parts.values())
    notes = []
    if parts["decoding"] > parts["encoding"]:
        wanted = job.rates.encode_x.value / job.rates.decode_x.value
        notes.append(f"a GPU needs {wanted:.1f} CPU threads to decode for it; it has {workers / gpus:g}")
    seconds = job.rates.precompute_start_s.value + busy_s
    return StagePlan("precompute", gpus, seconds, parts, largest(parts), disk, audio, audio / busy_s / gpus, notes)


def retarget(job: Job) -> StagePlan:
    """Targets of every LLM in precompute's config, and tasks: one process, a command for each LLM."""
    corpus, rates, sets = job.corpus, job.rates, len(job.shapes.precompute.targets)
    disk = {**storage.targets(corpus, job.shapes), **storage.tasks(corpus)}
    parts = {
        "start": sets * rates.retarget_start_s.value,
        "targets": sets * corpus.num_all * rates.target_s.value,
    }
    read = disk["token ids"]
    return StagePlan("retarget", 1, sum(parts.values()), parts, largest(parts), disk, read, 0.0)


def evaluate(job: Job) -> StagePlan:
    """Every system answers every question, in one process.

    Raises:
        UserError: the LLM does not fit the GPU.
    """
    cfg, shapes, corpus, rates = job.cfg, job.shapes, job.corpus, job.rates
    item_bytes = 4 if shapes.evaluate.llm.dtype == "float32" else 2
    weights = item_bytes * shapes.llm.parameters / GIB
    if cfg.gpu != "cpu" and weights > MARGIN * job.gpu.memory_gib and not shapes.evaluate.llm.device_map:
        raise UserError(
            f"evaluate: the weights of LLM {shapes.evaluate.llm.path}, {weights:.1f} GiB, do not fit {cfg.gpu} "
            f"({job.gpu.memory_gib:g} GiB); take evaluate.words=[llm.device_map=auto] or a larger GPU"
        )
    questions = corpus.num_test * corpus.tasks
    texts = 1 + (shapes.evaluate.cascade is not None)
    answers = shapes.systems * ((1 - cfg.unfinished) * rates.answer_s.value + cfg.unfinished * rates.cut_answer_s.value)
    parts = {
        "answers": questions * (texts * rates.answer_s.value + answers),
        "mapper": shapes.systems * corpus.num_test * rates.hear_s.value,
        "scores": (texts + shapes.systems) * questions * rates.score_s.value,
        "start": rates.evaluate_start_s.value,
    }
    disk = storage.evaluation(corpus, shapes, texts)
    read = corpus.test_s * formulas.feature_bytes_per_s(shapes.frame_hz, shapes.width) * (texts + shapes.systems)
    seconds = sum(parts.values())
    return StagePlan("evaluate", 1, seconds, parts, largest(parts), disk, read, read / seconds)
