"""Precompute over Ray: the units of ``sm_train.precompute``, spread over actors.

    python -m cluster.precompute CONFIG.yaml [key=value ...]

Joins the cluster that RAY_ADDRESS names; without it a Ray of its own starts on this machine and ends with the command.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.encoding.actors import DecodeActor, EncodingActor
from cluster.encoding.dispatch import Dispatch
from cluster.encoding.gauges import Gauges
from sm_train import config
from sm_train.data import store
from sm_train.encoding.settings import PrecomputeConfig
from sm_train.errors import UserError, run_command
from sm_train.meter import Event
from sm_train.models.speech import pick_device
from sm_train.precompute import UNITS_AHEAD, run
from sm_train.records import Unit

_DECODE_CALLS = 4  # that a decode actor has at hand


def spread(cfg: PrecomputeConfig, units: Sequence[Unit]) -> Generator[Event, None, None]:
    """Encode units on ``cfg.actors`` actors; receipts come in the order of completion."""
    import ray

    _connect(ray, cfg)
    if threading.current_thread() is threading.main_thread():  # Ray has put its own handler
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        gauges = Gauges()
        for event in _dispatch(ray, _with_absolute_paths(cfg), units).run():
            gauges.add(event)
            yield event
    finally:
        ray.shutdown()


def _connect(ray: Any, cfg: PrecomputeConfig) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default; unset, Ray warns
    quiet = {"log_to_driver": False, "logging_level": "error"}
    if address := os.environ.get("RAY_ADDRESS"):
        require_reachable(address)
        ray.init(address=address, **quiet)
    else:
        if cfg.actor_gpus and pick_device("auto") != "cuda":
            raise UserError(
                f"actor_gpus is {cfg.actor_gpus:g}, but there is no GPU here; name a cluster by RAY_ADDRESS"
            )
        # "local" is said explicitly: Ray would otherwise join the latest cluster that anybody started here
        own = {"num_cpus": cfg.actors * _cpus(cfg) + cfg.decode_actors * cfg.decode_actor_cpus}
        own["object_store_memory"] = (512 if cfg.decode_actors else 128) << 20
        ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", **own, **quiet)


def require_reachable(address: str) -> None:
    """Raises UserError if nobody listens at host:port, where Ray would try for minutes; others are Ray's to look up."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "://" not in host:
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            reason = f"RAY_ADDRESS is {address!r}, where no Ray answers ({error})"
            raise UserError(f"{reason}; start the cluster, or unset it for a Ray of this command's own") from None


def _cpus(cfg: PrecomputeConfig) -> int:
    """CPUs of an encoding actor: its threads, and its decoding processes where it has some."""
    return cfg.threads + (0 if cfg.decode_actors else cfg.decode_workers)


def _dispatch(ray: Any, cfg: PrecomputeConfig, units: Sequence[Unit]) -> Dispatch:
    """Start decode actors, which Ray itself starts again when they die, and say how an encoding actor is started."""
    decoding = ray.remote(DecodeActor).options(
        num_cpus=cfg.decode_actor_cpus, max_restarts=-1, max_task_retries=0, max_concurrency=_DECODE_CALLS
    )
    decoders = [decoding.remote(cfg.decode_actor_cpus, cfg.decode_timeout_s) for _ in range(cfg.decode_actors)]
    encoding = ray.remote(EncodingActor).options(
        num_cpus=_cpus(cfg), num_gpus=cfg.actor_gpus, max_restarts=0, max_task_retries=0,
        max_concurrency=UNITS_AHEAD, runtime_env={"env_vars": {"OMP_NUM_THREADS": str(cfg.threads)}},
    )  # fmt: skip
    wanted = f"{_cpus(cfg)} CPUs and {cfg.actor_gpus:g} GPUs for an encoder"
    if decoders:
        wanted += f", or {cfg.decode_actor_cpus} CPUs for a decode actor,"
    ready = [decoder.ready.remote() for decoder in decoders]
    return Dispatch(ray, lambda: encoding.remote(cfg, decoders), cfg.actors, wanted, units, ready)


def _with_absolute_paths(cfg: PrecomputeConfig) -> PrecomputeConfig:
    """For actors, whose working folder may be another one; the contract keeps what the config says."""
    folder = Path(cfg.encoder.path)
    encoder = replace(cfg.encoder, path=str(folder.resolve())) if folder.is_dir() else cfg.encoder
    return replace(cfg, manifest=store.absolute(cfg.manifest), out=store.absolute(cfg.out), encoder=encoder)


def main(argv: list[str]) -> None:
    cfg = config.load(PrecomputeConfig, argv, "cluster.precompute")
    if cfg.share:
        raise UserError(
            f"share is {cfg.share!r}, but Ray shares the units among actors; set actors, or share to nothing"
        )
    if cfg.encoder.device == "auto":  # the actors' device, not this process's, belongs to the contract
        if not cfg.actor_gpus and pick_device("auto") == "cuda":
            raise UserError("actor_gpus is 0, but there is a GPU here: set actor_gpus=1, or encoder.device=cpu")
        cfg = replace(cfg, encoder=replace(cfg.encoder, device="cuda" if cfg.actor_gpus else "cpu"))
    run(cfg, spread, cfg.actors)


if __name__ == "__main__":
    run_command(main)
