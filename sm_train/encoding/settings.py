"""What precompute is asked for, and the contract that follows from it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from sm_train import config
from sm_train.models.speech import ENCODER_FRAME_RATE_HZ, EncoderConfig, pick_device
from sm_train.models.targets import TargetConfig
from sm_train.records import Unit


@dataclass(frozen=True)
class Share:
    """One of so many shares of a set's units, which processes beside each other encode."""

    index: int
    count: int

    @classmethod
    def of(cls, text: str) -> Share:
        """What "0/3" stands for.

        Raises:
            ValueError: it is not of that form, or there is no such share.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
        if not found or not int(found[1]) < int(found[2]):
            raise ValueError(f"share is {text!r}; it must be I/N with I from 0 to N - 1, as 0/3, 1/3 and 2/3")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def of_units(self, units: Sequence[Unit]) -> list[Unit]:
        """Its own of all units of a set."""
        return [unit for unit in units if unit.index % self.count == self.index]


@dataclass(frozen=True)
class PrecomputeConfig:
    """A shard set: which audio, through which encoder, for which LLMs."""

    manifest: str = config.key(
        config.REQUIRED, "Parquet or JSONL manifest, or its address; relative audio starts at its folder"
    )
    out: str = config.key(config.REQUIRED, "the shard set: a folder, s3://bucket/prefix or gs://bucket/prefix")
    encoder: EncoderConfig = config.key(EncoderConfig(), "the frozen speech encoder")
    targets: list[TargetConfig] = config.key(
        [], "the LLMs: a list of {name, llm, revision, pad_token, normaliser, store}"
    )
    unit_utterances: int = config.key(256, "consecutive utterances that become one part")
    batch_s: float = config.key(120.0, "padded seconds of audio in one forward pass of the encoder")
    max_duration_s: float = config.key(60.0, "longer utterances are quarantined as too_long")
    silence_dbfs: float = config.key(-80.0, "utterances whose loudest sample is not above this are silent")
    max_quarantined_share: float = config.key(
        0.01, "the run stops once more than this share is quarantined for certain"
    )
    requeue: bool = config.key(False, "run quarantined utterances again, after their audio was mended")
    log: str = config.key("auto", "file of measurements, a line a unit; auto: log.jsonl in a local set's folder | none")
    share: str | None = config.key(
        "", "sm_train.precompute: encode only these units, as 0/3 for the first of three processes beside each other"
    )
    threads: int = config.key(1, "CPU threads of one encoder; part of the contract, as it moves last bits")
    decode_workers: int = config.key(1, "processes that decode audio beside one encoder")
    decode_timeout_s: float = config.key(60.0, "a decoder that is at one utterance for longer is ended")
    ahead_mb: int = config.key(1024, "decoded, encoded and not yet written data of one encoder; at least a unit goes")
    actors: int = config.key(2, "cluster.precompute: encoding actors; one asks Ray for threads + decode_workers CPUs")
    actor_gpus: float = config.key(0.0, "cluster.precompute: GPUs of one actor, a fraction if several share one")
    decode_actors: int = config.key(
        0, "cluster.precompute: actors that decode for all encoders, on any node, in place of decode_workers"
    )
    decode_actor_cpus: int = config.key(4, "cluster.precompute: CPUs, and decoding processes, of one of them")

    def __post_init__(self) -> None:
        for name in (
            "unit_utterances", "batch_s", "threads", "actors", "decode_workers", "decode_timeout_s",
            "decode_actor_cpus", "max_duration_s", "ahead_mb",
        ):  # fmt: skip
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above zero")
        for name, least, most in (
            ("max_quarantined_share", 0, 1), ("silence_dbfs", -1e4, 0), ("decode_actors", 0, math.inf),
            ("actor_gpus", 0, math.inf),
        ):  # fmt: skip
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be between {least:g} and {most:g}")
        if self.share:
            Share.of(self.share)
            if self.requeue:
                raise ValueError(
                    f"share is {self.share!r} and requeue is true; run quarantined utterances without share"
                )


def describe(cfg: PrecomputeConfig, manifest_hash: str) -> dict[str, Any]:
    """The contract of the shard set a config asks for."""
    encoder = cfg.encoder
    return {
        "schema": 2,
        "encoder": encoder.path,
        "encoder_revision": encoder.revision,
        "layer": encoder.layer,
        "pool": encoder.pool,
        "frame_rate_hz": ENCODER_FRAME_RATE_HZ / encoder.pool,
        "batching": encoder.batching,
        "compute_dtype": encoder.dtype,
        "dtype": "float16",
        "manifest_hash": manifest_hash,
        "unit_utterances": cfg.unit_utterances,
        "batch_s": cfg.batch_s,
        "max_duration_s": cfg.max_duration_s,
        "silence_dbfs": cfg.silence_dbfs,
    }


def environment(cfg: PrecomputeConfig) -> dict[str, Any]:
    """What else the bytes of the features depend on."""
    names = ("torch", "transformers", "numpy", "soundfile", "soxr")
    software = {name: version(name) for name in names}
    device_type = pick_device(cfg.encoder.device).partition(":")[0]
    return {"device_type": device_type, "threads": cfg.threads, "software": software}
