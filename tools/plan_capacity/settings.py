"""What a plan is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sm_train import config
from sm_train.errors import UserError
from tools.plan_capacity import hardware

STAGES = ("precompute", "retarget", "pretrain", "tune", "evaluate")


@dataclass(frozen=True)
class Stage:
    """A stage's own config, as its command would get it."""

    file: str = config.key(config.REQUIRED, "the stage's YAML file")
    words: list[str] = config.key([], "its overrides, as [batch.lanes=64,loop.steps=1000]")
    gpus: int = config.key(0, "GPUs of this stage; 0 for all")


@dataclass(frozen=True)
class CorpusConfig:
    """What of a corpus no stage's config knows."""

    manifest: str | None = config.key(
        None, "manifest to read lengths, texts and bytes from; null: by the figures below"
    )
    instructions: str | None = config.key(None, "beside a manifest: the tasks; null: tasks_per_utterance of them")
    mean_s: float = config.key(12.3, "mean utterance")
    lengths: list[Any] = config.key(
        [], "mixture of utterances: [[share, normal, mean, deviation], [share, uniform, least, most], ...], then "
        "scaled to mean_s; [] if all are mean_s long"
    )  # fmt: skip
    audio_mb_per_hour: float = config.key(62.0, "bytes of the audio files: 16 kHz FLAC is about 62 MB/h")
    words_per_hour: float = config.key(9780.0, "words spoken")
    tokens_per_word: float = config.key(1.33, "tokens of the LLM a word")
    prompt_tokens: int = config.key(30, "tokens of a prompt around the speech")
    valid_hours: float = config.key(0.0, "hours to validate on, besides those planned for")
    test_hours: float = config.key(0.0, "hours to evaluate on, besides those planned for")
    tasks_per_utterance: float = config.key(1.0, "instructions about an utterance")
    text_bytes: float = config.key(180.0, "bytes of a transcript")
    id_bytes: float = config.key(16.0, "bytes of an id")
    audio_bytes: float = config.key(45.0, "bytes of the path of an audio file")

    def __post_init__(self) -> None:
        for name in ("audio_mb_per_hour", "words_per_hour", "tokens_per_word", "prompt_tokens", "valid_hours",
                     "test_hours", "tasks_per_utterance", "text_bytes", "id_bytes", "audio_bytes"):  # fmt: skip
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"corpus.{name} is {getattr(self, name)}; it must be 0 or more")


@dataclass(frozen=True)
class PlanConfig:
    """A corpus, machines, stages."""

    precompute: Stage = config.key(Stage(), "precompute")
    pretrain: Stage = config.key(Stage(), "pretrain")
    tune: Stage = config.key(Stage(), "tune")
    evaluate: Stage = config.key(Stage(), "evaluate")
    stages: list[str] = config.key(list(STAGES), f"those to plan: {', '.join(STAGES)}")
    corpus: CorpusConfig = config.key(CorpusConfig(), "what of the corpus no stage's config knows")
    hours: Any = config.key(0.0, "hours of audio to train on, or [some, others] for a table; 0: the manifest's")
    gpus: int = config.key(1, "GPUs, or processes on a CPU")
    gpu: str = config.key("A100-80", f"which: {', '.join(hardware.KNOWN)}")
    epochs: float = config.key(0.0, "epochs of pretraining; 0 for the config's own number of steps")
    encoder_parameters: float = config.key(635e6, "of the speech encoder up to its layer")
    llm: dict[str, int] = config.key(
        {}, "layers, width, heads, kv_heads, feed_forward and vocabulary of an LLM that is not in a folder here"
    )
    gpus_per_node: int = config.key(8, "GPUs of a node, with NVLink among them")
    vcpus_per_gpu: float = config.key(8.0, "CPU threads beside each GPU, to decode audio with")
    network_gb_s: float = config.key(12.5, "GB/s of a node's network, one way: 100 Gbit/s")
    store_gb_s: float = config.key(10.0, "GB/s that the storage gives or takes, all nodes together")
    disk_gb_s: float = config.key(3.0, "GB/s of a node's own disk or page cache, where features are cached")
    cache_tb: float = config.key(0.0, "TB of features that a node keeps near; a corpus that fits is fetched once")
    encoder_share: float = config.key(0.24, "of a GPU's peak that the encoder reaches, end to end")
    decode_x: float = config.key(500.0, "times real time that one CPU thread makes audio ready for the encoder")
    write_mb_s: float = config.key(970.0, "MB/s of one writer of shards")
    unfinished: float = config.key(0.0, "share of the mapped answers that run to max_new_tokens: 1 if hardly trained")
    rates: str | None = config.key(None, "what tools.plan_capacity.calibrate has written; null: assumed rates")
    mtbf_hours: float = config.key(0.0, "mean hours between faults of the whole job; 0: by GPU, as Llama 3's")
    price_per_gpu_hour: float = config.key(0.0, "what a GPU costs an hour; 0: no costs are printed")
    price_per_tb_month: float = config.key(23.0, "what a TB of features costs a month")
    months: float = config.key(1.0, "that the features are kept")
    json: bool = config.key(False, "print the plan as JSON")
    out: str | None = config.key(None, "file to write the plan to, as JSON")

    def __post_init__(self) -> None:
        if not self.sizes:
            raise ValueError("hours is []; give one size or more, as hours=[960.9,10000]")
        for hours in self.sizes:
            if isinstance(hours, bool) or not isinstance(hours, int | float) or not 0 <= hours < math.inf:
                raise ValueError(f"hours is {hours}; it must be above zero")
            if hours == 0 and not self.corpus.manifest:
                raise ValueError("hours is 0; give the hours of audio to plan for, above zero, as hours=960.9")
        if unknown := [name for name in self.stages if name not in STAGES]:
            raise ValueError(f"stages names {unknown[0]!r}; those known are {', '.join(STAGES)}")
        for name in ("gpus", "gpus_per_node", "vcpus_per_gpu", "network_gb_s", "store_gb_s", "disk_gb_s",
                     "encoder_share", "decode_x", "write_mb_s", "encoder_parameters"):  # fmt: skip
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above zero")
        for name in ("epochs", "cache_tb", "mtbf_hours", "price_per_gpu_hour", "price_per_tb_month", "months"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if not 0 <= self.unfinished <= 1:
            raise ValueError(f"unfinished is {self.unfinished}; it must lie between 0 and 1")
        if not self.corpus.manifest and not 0 < self.corpus.mean_s < math.inf:
            raise ValueError(f"corpus.mean_s is {self.corpus.mean_s}; it must be above zero")

    @property
    def sizes(self) -> list[Any]:
        """The corpora asked for, in hours."""
        return list(self.hours) if isinstance(self.hours, list | tuple) else [self.hours]

    def gpus_of(self, stage: str) -> int:
        """GPUs of a stage; an evaluation is one process, and so is the making of targets."""
        if stage in ("evaluate", "retarget"):
            return 1
        chosen = getattr(self, stage).gpus or self.gpus
        if chosen > self.gpus:
            raise UserError(f"{stage}.gpus is {chosen}, but gpus is {self.gpus}; raise gpus")
        return int(chosen)
