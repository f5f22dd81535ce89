"""Precompute: a manifest's audio becomes a shard set of frozen features, then a target set for each LLM.

    python -m sm_train.precompute CONFIG.yaml [key=value ...]

One process does everything here; ``cluster.precompute`` spreads the same units over Ray actors. An utterance that ends
the encoder's process ends the command here; over Ray, with ``actors=1`` too, it is found and quarantined. With
``share=I/N`` it encodes one of N shares of the units, beside the processes of the others; the command without it
completes the set.
"""

from __future__ import annotations

import json
import shlex
import signal
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sm_train import config, quarantine, requeue
from sm_train.data import manifest, owner, remote_sets, shards, store
from sm_train.data.store import Store
from sm_train.encoding.settings import PrecomputeConfig, Share, describe, environment
from sm_train.encoding.worker import make_encoder, this_worker
from sm_train.errors import run_command
from sm_train.meter import LOG, Event, Meter
from sm_train.models import targets
from sm_train.records import Receipt, Unit, Utterance

UNITS_AHEAD = 3
"""Units that one process has at hand: one that is decoded, one in the encoder, one that is written."""

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
    has_work = cfg.requeue or owner.is_left(place) or not _is_whole(cfg, place, _units(cfg, place, utterances))
    with owner.hold(place) if has_work else nullcontext(place) as held:
        _bring_to_completion(cfg, spread, encoders, held, utterances, contract)


def run_share(cfg: PrecomputeConfig, spread: Spread, command: str) -> None:
    """Encode the units of ``cfg.share`` beside the processes of other shares, and leave the set unfinished.

    Args:
        command: what completes the set, for messages.

    Raises:
        UserError: a driver of the whole set, or another process of this share, is at work; or the set was begun with
            another contract.
    """
    place, share = store.at(cfg.out), Share.of(cfg.share or "")
    utterances = manifest.read_manifest(cfg.manifest)
    contract = describe(cfg, manifest.manifest_hash(utterances))
    if _has_all(place, _units(cfg, place, utterances)):
        shards.require_same(contract, _described(place, contract), place.uri, "give another out folder")
        print(f"{place.uri}: complete, {len(utterances)} utterances; its target sets: {command}", flush=True)
        return
    for target in cfg.targets:
        targets.require_llm(target)
    with owner.hold(place, str(share)) as held:
        shards.open_set(held, contract | environment(cfg), beside_others=True)
        units = _units(cfg, held, utterances)
        mine = share.of_units(units)
        _encode_units(cfg, held, units, spread, 1, mine)
    left = len(units) - len(shards.committed(place, [unit.part for unit in units]))
    said = f"{left} of {len(units)} are left to others; then" if left else f"all {len(units)} are there; now"
    print(f"{place.uri}: share {share} is done, {len(mine)} parts; {said}: {command}", flush=True)


def _units(cfg: PrecomputeConfig, place: Store, utterances: Sequence[Utterance]) -> list[Unit]:
    """The manifest's units, and those of rounds of requeue."""
    return requeue.with_rounds(place, manifest.cut_units(utterances, cfg.unit_utterances), cfg.unit_utterances)


def _is_whole(cfg: PrecomputeConfig, place: Store, units: Sequence[Unit]) -> bool:
    """Whether the shard set is complete, rounds included, and each target set covers it."""
    if not _has_all(place, units):
        return False
    count = _described(place, {"num_committed": 0})["num_committed"]
    for target in cfg.targets:
        name = f"targets/{target.name}/{shards.DATASET}"
        covers = json.loads(place.read(name)).get("covers", {}) if place.exists(name) else {}
        if covers.get("num_utterances") != count:
            return False
    return True


def _has_all(place: Store, units: Sequence[Unit]) -> bool:
    """Whether the shard set is complete with so many parts."""
    return shards.is_complete(place) and _described(place, {"num_parts": 0})["num_parts"] == len(units)


def _bring_to_completion(
    cfg: PrecomputeConfig, spread: Spread, encoders: int, place: Store, utterances: Sequence[Utterance],
    contract: dict[str, Any],
) -> None:  # fmt: skip
    if shards.is_complete(place):
        shards.require_same(contract, _described(place, contract), place.uri, "give another out folder")
    units = _units(cfg, place, utterances)
    if cfg.requeue or not _has_all(place, units):
        for target in cfg.targets:
            targets.require_llm(target)
        contract |= environment(cfg)
        shards.open_set(place, contract)
    if cfg.requeue:
        units += requeue.begin(place, units, cfg.unit_utterances)
    if _has_all(place, units):
        print(f"{place.uri}: complete, {len(utterances)} utterances", flush=True)
    else:
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


def in_this_process(cfg: PrecomputeConfig, units: Sequence[Unit]) -> Generator[Receipt, None, None]:
    """Encode units in order, some ahead. An utterance that ends the encoder's process ends this one."""
    encoder = make_encoder(cfg)
    ahead: deque[Future[Receipt]] = deque()
    is_over = False
    try:
        for unit in units:
            ahead.append(encoder.submit(unit))
            if len(ahead) >= UNITS_AHEAD:
                yield replace(ahead.popleft().result(), worker=this_worker())
        while ahead:
            yield replace(ahead.popleft().result(), worker=this_worker())
        is_over = True
    finally:
        encoder.close(abandon=not is_over)


def _encode_units(
    cfg: PrecomputeConfig, place: Store, units: Sequence[Unit], spread: Spread, encoders: int,
    mine: Sequence[Unit] | None = None,
) -> None:  # fmt: skip
    """Encode what is not there yet of all units of the set, or of those that are this process's share."""
    present = set(shards.committed(place, [unit.part for unit in units]))
    done = [unit for unit in units if unit.part in present]
    todo = [unit for unit in units if unit.part not in present]
    tally = quarantine.Tally(place, done, todo, cfg.max_quarantined_share)
    if done:
        print(f"{place.uri}: {len(done)} of {len(units)} parts are there already", flush=True)
    if mine is not None:
        todo = [unit for unit in mine if unit.part not in present]
    total_s = sum(u.duration_s for unit in todo for u in unit.utterances)
    if todo:
        with closing(spread(cfg, todo)) as events, Meter(total_s, min(encoders, len(todo)), _log_file(cfg)) as meter:
            for event in events:
                meter.add(event)
                tally.add(event)
    if mine is None:
        tally.report()


def _log_file(cfg: PrecomputeConfig) -> Path | None:
    if cfg.log == "none" or (cfg.log == "auto" and "://" in cfg.out):
        return None
    name = f"log-{cfg.share.replace('/', '-of-')}.jsonl" if cfg.share else LOG
    return Path(cfg.out) / name if cfg.log == "auto" else Path(cfg.log)


def _completing(argv: Sequence[str]) -> str:
    """The command without its share."""
    words = [word for word in argv if not word.startswith("share=")]
    off = ["share="] if config.read_yaml(Path(argv[0])).get("share") else []
    return shlex.join(["python", "-m", "sm_train.precompute", *words, *off])


def main(argv: list[str]) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: one line, and nothing left at work
    cfg = config.load(PrecomputeConfig, argv, "sm_train.precompute")
    if cfg.share:
        run_share(cfg, in_this_process, _completing(argv))
    else:
        run(cfg, in_this_process)


if __name__ == "__main__":
    run_command(main)
