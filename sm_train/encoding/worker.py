"""The worker that one process, of the command or of an actor, holds."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from typing import Any

import torch

from sm_train.data import manifest, shards, store
from sm_train.data.store import Store
from sm_train.encoding.decode import DecodeConfig
from sm_train.encoding.decoders import DecodePool, Decoder
from sm_train.encoding.settings import PrecomputeConfig, environment
from sm_train.encoding.units import UnitEncoder
from sm_train.models.speech import SpeechEncoder


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
    place = store.at(cfg.out)
    _require_the_sets_own(cfg, place, encoder.facts)
    made = decoder(decoding) if decoder else DecodePool(decoding, cfg.decode_workers, cfg.decode_timeout_s)
    return UnitEncoder(encoder, made, place, cfg.batch_s, cfg.max_duration_s, cfg.ahead_mb << 20, cfg.threads)


def _require_the_sets_own(cfg: PrecomputeConfig, place: Store, facts: dict[str, Any]) -> None:
    """Raises UserError if this process's software or its encoder's files are not those of the set's other parts."""
    if place.exists(shards.CONTRACT):
        here, said = environment(cfg), json.loads(place.read(shards.CONTRACT))
        remedy = "install on this node what the set was begun with, or give another out folder"
        shards.require_same(here, {name: said.get(name) for name in here}, this_worker(), remedy)
    for part in shards.parts_of(place):
        if shards.is_committed(place, part):
            remedy = "the encoder's files have changed since: restore them, or give another out folder"
            shards.require_same(facts, shards.read_part(place, part)["facts"], f"{place.uri}/{part}", remedy)
            return


def this_worker() -> str:
    """What this process is called in logs."""
    return f"{socket.gethostname()}:{os.getpid()}"
