"""Precompute: a manifest's audio becomes a shard set of frozen features, then a target set for each LLM.

    python -m sm_train.precompute CONFIG.yaml [key=value ...]

One process does everything here; ``cluster.precompute`` spreads the same units over Ray actors.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

from sm_train import config
from sm_train.data import manifest, owner, remote_sets, shards, store
from sm_train.data.store import Store
from sm_train.encoding.decode import DecodeConfig
from sm_train.encoding.decoders import DecodePool
from sm_train.encoding.units import Decoder, UnitEncoder
from sm_train.errors import UserError, run_command
from sm_train.models import targets
from sm_train.models.speech import ENCODER_FRAME_RATE_HZ, EncoderConfig, SpeechEncoder, pick_device
from sm_train.models.targets import TargetConfig
from sm_train.records import Receipt, Unit, Utterance
from sm_train.runlog import Progress

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
    targets: list[TargetConfig] = config.key([], "the LLMs: a list of {name, llm, revision, pad_token, normaliser}")
    unit_utterances: int = config.key(256, "consecutive utterances that become one part")
    batch_s: float = config.key(120.0, "padded seconds of audio in one forward pass of the encoder")
    max_duration_s: float = config.key(60.0, "longer utterances are quarantined as too_long")
    silence_dbfs: float = config.key(-80.0, "utterances whose loudest sample is not above this are silent")
    max_quarantined_share: float = config.key(0.01, "the run fails above this share of quarantined utterances")
    threads: int = config.key(1, "CPU threads of one encoder; part of the contract, as it moves last bits")
    decode_workers: int = config.key(1, "processes that decode audio for one encoder")
    decode_timeout_s: float = config.key(60.0, "a decoder that is at one utterance for longer is ended")
    ahead_mb: int = config.key(1024, "decoded, encoded and not yet written data of one encoder; at least a unit goes")
    actors: int = config.key(2, "cluster.precompute: encoding actors")
    actor_gpus: float = config.key(0.0, "cluster.precompute: GPUs of one actor, a fraction if several share one")

    def __post_init__(self) -> None:
        for name in ("unit_utterances", "batch_s", "threads", "actors", "decode_workers", "decode_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above zero")


Spread = Callable[[PrecomputeConfig, Sequence[Unit]], Iterator[Receipt]]


def run(cfg: PrecomputeConfig, spread: Spread) -> None:
    """Bring the shard set and its target sets to completion: whatever is there already is not done again."""
    place = store.at(cfg.out)
    utterances = manifest.read_manifest(cfg.manifest)
    contract = describe(cfg, manifest.manifest_hash(utterances))
    has_work = owner.is_left(place) or not all(map(shards.is_complete, _sets(cfg)))
    with owner.hold(place) if has_work else nullcontext(place) as held:
        _complete(cfg, spread, held, utterances, contract)


def _sets(cfg: PrecomputeConfig) -> list[Store]:
    """The shard set and its target sets."""
    return [store.at(at) for at in (cfg.out, *(f"{cfg.out.rstrip('/')}/targets/{t.name}" for t in cfg.targets))]


def _complete(
    cfg: PrecomputeConfig, spread: Spread, place: Store, utterances: Sequence[Utterance], contract: dict[str, Any]
) -> None:
    units = manifest.cut_units(utterances, cfg.unit_utterances)
    if shards.is_complete(place):
        shards.require_same(contract, _described(place, contract), place.uri, "give another out folder")
        print(f"{place.uri}: complete, {len(utterances)} utterances", flush=True)
    else:
        contract |= environment(cfg)
        shards.open_set(place, contract)
        shards.remove_leftovers(place)
        _encode_units(place, units, lambda todo: spread(cfg, todo))
        _check_quarantine(cfg, place, units)
        shards.commit(place, [unit.part for unit in units], contract, "utterances.parquet")
    for target in cfg.targets:
        built = remote_sets.with_local_copy(place, target.name, partial(targets.build, target))
        print(f"{cfg.out}/targets/{target.name}: {'built' if built else 'complete'}", flush=True)


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
    decoding = DecodeConfig(
        manifest.root_of(cfg.manifest),
        cfg.max_duration_s,
        cfg.silence_dbfs,
        encoder.shortest_samples,
        encoder.inputs.to_json(),
    )
    made = decoder(decoding) if decoder else DecodePool(decoding, cfg.decode_workers, cfg.decode_timeout_s)
    return UnitEncoder(encoder, made, store.at(cfg.out), cfg.batch_s, cfg.max_duration_s, cfg.ahead_mb << 20)


def in_this_process(cfg: PrecomputeConfig, units: Sequence[Unit]) -> Iterator[Receipt]:
    """Encode units in order, some ahead."""
    encoder = make_encoder(cfg)
    ahead: deque[Future[Receipt]] = deque()
    try:
        for unit in units:
            ahead.append(encoder.submit(unit))
            if len(ahead) >= UNITS_AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        encoder.close()


def _encode_units(place: Store, units: Sequence[Unit], receipts: Callable[[Sequence[Unit]], Iterator[Receipt]]) -> None:
    done = shards.committed(place, [unit.part for unit in units])
    todo = [unit for unit in units if unit.part not in done]
    total_s = sum(u.duration_s for unit in todo for u in unit.utterances)
    if len(todo) < len(units):
        print(f"{place.uri}: {len(units) - len(todo)} of {len(units)} parts are there already", flush=True)
    with Progress("precompute", total_s) as progress:
        for receipt in receipts(todo) if todo else ():
            progress.advance(receipt.audio_s, quarantined=receipt.num_quarantined)


def _check_quarantine(cfg: PrecomputeConfig, place: Store, units: Sequence[Unit]) -> None:
    rows = [row for part in shards.read_parts(place, [unit.part for unit in units]) for row in part["quarantined"]]
    num_utterances = sum(len(unit.utterances) for unit in units)
    if not rows:
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(row["reason"] for row in rows).most_common())
    print(
        f"{place.uri}: {len(rows)} of {num_utterances} utterances quarantined ({reasons})",
        flush=True,
    )
    if len(rows) > cfg.max_quarantined_share * num_utterances:
        first = rows[0]
        raise UserError(
            f"{len(rows)} of {num_utterances} utterances are quarantined ({reasons}), above max_quarantined_share "
            f"{cfg.max_quarantined_share:g}; the first is {first['id']!r}: {first['detail']}. "
            "Mend the audio files and run again with requeue=true, or raise max_quarantined_share and run "
            "again (a changed manifest needs another out folder)"
        )


def main(argv: list[str]) -> None:
    run(config.load(PrecomputeConfig, argv, "sm_train.precompute"), in_this_process)


if __name__ == "__main__":
    run_command(main)
