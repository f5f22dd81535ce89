"""Precompute over Ray: the units of ``sm_train.precompute``, spread over actors.

    python -m cluster.precompute CONFIG.yaml [key=value ...]

Joins the cluster that RAY_ADDRESS names; without it a Ray of its own starts on this machine and ends with the command.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sm_train import config
from sm_train.data import store
from sm_train.encoding.units import UnitEncoder
from sm_train.errors import UserError, run_command
from sm_train.precompute import PrecomputeConfig, make_encoder, run
from sm_train.records import Receipt, Unit

_AHEAD = 2  # units an actor has at hand: one at work and the next
_PATIENCE_S = 60.0  # after which waiting in vain for a place is said
_PAUSE_S = 1.0  # before work is given again to an actor that could not be reached


class EncodingActor:
    """One process that encodes units. The encoder is made at the first one, so that its errors come back as errors."""

    def __init__(self, cfg: PrecomputeConfig) -> None:
        self.cfg = cfg
        self.encoder: UnitEncoder | None = None

    def ready(self) -> None:
        """Answers once this actor has a place in the cluster."""

    def encode_unit(self, unit: Unit) -> Receipt:
        """Encode and commit one part; safe to repeat."""
        self.encoder = self.encoder or make_encoder(self.cfg)
        return self.encoder.encode_unit(unit)


def spread(cfg: PrecomputeConfig, units: Sequence[Unit]) -> Iterator[Receipt]:
    """Encode units on ``cfg.actors`` actors; receipts come in the order of completion."""
    import ray

    _connect(ray, cfg)
    try:
        yield from _work(ray, _with_absolute_paths(cfg), units)
    finally:
        ray.shutdown()


def _connect(ray: Any, cfg: PrecomputeConfig) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default; unset, Ray warns
    quiet = {"log_to_driver": False, "logging_level": "error"}
    if address := os.environ.get("RAY_ADDRESS"):
        ray.init(address=address, **quiet)
    else:  # "local" is said explicitly: Ray would otherwise join the latest cluster that anybody started here
        own = {"num_cpus": cfg.actors * cfg.threads, "object_store_memory": 128 << 20}
        ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", **own, **quiet)


def _with_absolute_paths(cfg: PrecomputeConfig) -> PrecomputeConfig:
    """For actors, whose working folder may be another one; the contract keeps what the config says."""
    folder = Path(cfg.encoder.path)
    encoder = replace(cfg.encoder, path=str(folder.resolve())) if folder.is_dir() else cfg.encoder
    return replace(cfg, manifest=store.absolute(cfg.manifest), out=store.absolute(cfg.out), encoder=encoder)


def _work(ray: Any, cfg: PrecomputeConfig, units: Sequence[Unit]) -> Iterator[Receipt]:
    """Feed actors that have a place, wait, and send again whatever died with its actor or node."""
    actor_class = ray.remote(EncodingActor).options(
        num_cpus=cfg.threads, num_gpus=cfg.actor_gpus, max_restarts=-1, max_task_retries=-1,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(cfg.threads)}},
    )  # fmt: skip
    todo, num_done = deque(units), 0
    placed: set[Any] = set()
    flying: dict[Any, tuple[Any, Unit | None]] = {}

    def ask_for_a_place(actor: Any) -> None:
        flying[actor.ready.remote()] = (actor, None)

    for _ in range(min(cfg.actors, len(units))):
        ask_for_a_place(actor_class.remote(cfg))
    while num_done < len(units):
        arrived, _ = ray.wait(list(flying), num_returns=1, timeout=_PATIENCE_S)
        if not arrived:
            if not placed:
                wanted = f"{cfg.threads} CPUs and {cfg.actor_gpus:g} GPUs"
                print(
                    f"waiting: no node of the Ray cluster has {wanted} free for an actor", file=sys.stderr, flush=True
                )
            continue
        (ref,) = arrived
        actor, unit = flying.pop(ref)
        try:
            receipt = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, UserError) else error) from None
        except ray.exceptions.RayActorError as error:
            time.sleep(_PAUSE_S)
            if unit:
                todo.appendleft(unit)
            if unit is None or actor in placed:
                placed.discard(actor)
                died = isinstance(error, ray.exceptions.ActorDiedError)
                ask_for_a_place(actor_class.remote(cfg) if died else actor)
        else:
            if unit is None:
                placed.add(actor)
            else:
                num_done += 1
                yield receipt
        for idle in placed:
            while todo and sum(other is idle for other, _ in flying.values()) < _AHEAD:
                following = todo.popleft()
                flying[idle.encode_unit.remote(following)] = (idle, following)


def main(argv: list[str]) -> None:
    cfg = config.load(PrecomputeConfig, argv, "cluster.precompute")
    if cfg.encoder.device == "auto":  # the actors' device, not this process's, belongs to the contract
        cfg = replace(cfg, encoder=replace(cfg.encoder, device="cuda" if cfg.actor_gpus else "cpu"))
    run(cfg, spread)


if __name__ == "__main__":
    run_command(main)
