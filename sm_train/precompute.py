"""Precompute: a manifest's audio becomes a shard set of frozen features, then a target set for each LLM.

    python -m sm_train.precompute CONFIG.yaml [key=value ...]

One process does everything here; ``cluster.precompute`` spreads the same units over Ray actors. An utterance that ends
the encoder's process ends the command here; over Ray, with ``actors=1`` too, it is found and quarantined.
"""

from __future__ import annotations

import json
import os
import socket
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sm_train import config, quarantine, requeue
from sm_train.data import manifest, owner, remote_sets, shards, store
from sm_train.data.store import Store
from sm_train.encoding.decode import DecodeConfig
from sm_train.encoding.decoders import DecodePool, Decoder
from sm_train.encoding.units import UnitEncoder
from sm_train.errors import run_command
from sm_train.meter import LOG, Event, Meter
from sm_train.models import targets
from sm_train.models.speech import ENCODER_FRAME_RATE_HZ, EncoderConfig, SpeechEncoder, pick_device
from sm_train.models.targets import TargetConfig
from sm_train.records import Receipt, Unit, Utterance

UNITS_AHEAD = 3
"""Units that one process has at hand: one that is decoded, one in the encoder, one that is written."""


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
            "decode_actor_cpus",
        ):  # fmt: skip
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above zero")


Spread = Callable[[PrecomputeConfig, Sequence[Unit]], Generator[Event, None, None]]


def run(cfg: PrecomputeConfig, spread: Spread, encoders: int = 1) -> None:
    """Bring the shard set and its target sets to completion: whatever is there already is not done again.

    Args:
        spread: encodes units somewhere.
        encoders: processes in which it does so.
    """
    place = store.at(cfg.out)
    utterances = manifest.read_manifest(cfg.manifest)
    contract = describe(cfg, manifest.manifest_hash(utterances))
    has_work = cfg.requeue or owner.is_left(place) or not _is_whole(cfg, place)
    with owner.hold(place) if has_work else nullcontext(place) as held:
        _bring_to_completion(cfg, spread, encoders, held, utterances, contract)


def _is_whole(cfg: PrecomputeConfig, place: Store) -> bool:
    """Whether the shard set is complete, and each target set covers it."""
    if not shards.is_complete(place):
        return False
    count = _described(place, {"num_committed": 0})["num_committed"]
    for target in cfg.targets:
        name = f"targets/{target.name}/{shards.DATASET}"
        covers = json.loads(place.read(name)).get("covers", {}) if place.exists(name) else {}
        if covers.get("num_utterances") != count:
            return False
    return True


def _bring_to_completion(
    cfg: PrecomputeConfig, spread: Spread, encoders: int, place: Store, utterances: Sequence[Utterance],
    contract: dict[str, Any],
) -> None:  # fmt: skip
    if shards.is_complete(place):
        shards.require_same(contract, _described(place, contract), place.uri, "give another out folder")
    if cfg.requeue or not shards.is_complete(place):
        shards.open_set(place, contract | environment(cfg))
    units = requeue.with_rounds(place, manifest.cut_units(utterances, cfg.unit_utterances), cfg.unit_utterances)
    if cfg.requeue:
        units += requeue.begin(place, units, cfg.unit_utterances)
    if shards.is_complete(place) and _described(place, {"num_parts": 0}) == {"num_parts": len(units)}:
        print(f"{place.uri}: complete, {len(utterances)} utterances", flush=True)
    else:
        contract |= environment(cfg)
        shards.open_set(place, contract)
        shards.remove_leftovers(place)
        try:
            _encode_units(cfg, place, units, spread, encoders)
        except quarantine.TooManyQuarantined:
            requeue.end(place)
            raise
        shards.commit(place, [unit.part for unit in units], contract, "utterances.parquet")
    for target in cfg.targets:
        said = remote_sets.with_local_copy(place, target.name, partial(targets.make, target))
        print(f"{cfg.out}/targets/{target.name}: {said}", flush=True)
    requeue.end(place)


def _described(place: Store, contract: dict[str, Any]) -> dict[str, Any]:
    dataset = json.loads(place.read(shards.DATASET))
    return {name: dataset.get(name) for name in contract}


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
    software = {name: version(name) for name in ("torch", "transformers", "numpy", "soundfile", "soxr")}
    device_type = pick_device(cfg.encoder.device).partition(":")[0]
    return {"device_type": device_type, "threads": cfg.threads, "software": software}


def make_encoder(cfg: PrecomputeConfig, decoder: Callable[[DecodeConfig], Decoder] | None = None) -> UnitEncoder:
    """The worker that one process, here or in an actor, holds.

    Args:
        decoder: makes what decodes for it; None for processes beside this one.
    """
    torch.set_num_threads(cfg.threads)
    encoder = SpeechEncoder(cfg.encoder)
    encoder.check_alone_equals_padded()
    decoding = DecodeConfig(
        manifest.root_of(cfg.manifest),
        cfg.max_duration_s,
        cfg.silence_dbfs,
        encoder.shortest_samples,
        encoder.longest_samples,
        encoder.inputs.to_json(),
    )
    made = decoder(decoding) if decoder else DecodePool(decoding, cfg.decode_workers, cfg.decode_timeout_s)
    return UnitEncoder(encoder, made, store.at(cfg.out), cfg.batch_s, cfg.max_duration_s, cfg.ahead_mb << 20)


def in_this_process(cfg: PrecomputeConfig, units: Sequence[Unit]) -> Generator[Receipt, None, None]:
    """Encode units in order, some ahead. An utterance that ends the encoder's process ends this one."""
    encoder = make_encoder(cfg)
    ahead: deque[Future[Receipt]] = deque()
    try:
        for unit in units:
            ahead.append(encoder.submit(unit))
            if len(ahead) >= UNITS_AHEAD:
                yield replace(ahead.popleft().result(), worker=this_worker())
        while ahead:
            yield replace(ahead.popleft().result(), worker=this_worker())
    finally:
        encoder.close()


def this_worker() -> str:
    """What this process is called in logs."""
    return f"{socket.gethostname()}:{os.getpid()}"


def _encode_units(cfg: PrecomputeConfig, place: Store, units: Sequence[Unit], spread: Spread, encoders: int) -> None:
    present = set(shards.committed(place, [unit.part for unit in units]))
    done = [unit for unit in units if unit.part in present]
    todo = [unit for unit in units if unit.part not in present]
    tally = quarantine.Tally(place, done, todo, cfg.max_quarantined_share)
    if done:
        print(f"{place.uri}: {len(done)} of {len(units)} parts are there already", flush=True)
    total_s = sum(u.duration_s for unit in todo for u in unit.utterances)
    if todo:
        with closing(spread(cfg, todo)) as events, Meter(total_s, min(encoders, len(todo)), _log_file(cfg)) as meter:
            for event in events:
                meter.add(event)
                tally.add(event)
    tally.report()


def _log_file(cfg: PrecomputeConfig) -> Path | None:
    if cfg.log == "none" or (cfg.log == "auto" and "://" in cfg.out):
        return None
    return Path(cfg.out) / LOG if cfg.log == "auto" else Path(cfg.log)


def main(argv: list[str]) -> None:
    run(config.load(PrecomputeConfig, argv, "sm_train.precompute"), in_this_process)


if __name__ == "__main__":
    run_command(main)
