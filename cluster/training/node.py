"""What Ray Train runs on each node of a training: starts the node's ranks, and stays with them to their end."""

from __future__ import annotations

import math
import signal
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.training.desk import Orders
from cluster.training.ranks import Place, Ranks, free_port, how
from sm_train.errors import STOPPED

GRACE_S = 5.0
"""Seconds that a rank which was lost waits for the others' word of why, and that those have to leave by themselves."""
_POLL_S = 0.25
_CALL_S = 60.0


class RanksLost(Exception):
    """Ranks have died or left because others did: started again, the same command goes on."""


@dataclass(frozen=True)
class NodeJob:
    """What every node is given."""

    module: tuple[str, ...]
    """What follows ``python -m`` in a rank's command."""
    ranks_per_node: int
    logs: str
    home: str
    env: dict[str, str]
    stop_s: float
    """Seconds that ranks have to save in, once asked to stop."""
    desk: Any
    """The handle of a :class:`~cluster.training.desk.Desk`."""


def train_node(job: NodeJob) -> int:
    """Run this node's ranks to their end; returns the code the run ends with.

    Raises:
        RanksLost: the run does not end; Ray Train starts the nodes' ranks again.
    """
    import ray
    from ray import train
    from ray.train.collective import broadcast_from_rank_zero

    context = train.get_context()
    node, nodes = context.get_world_rank(), context.get_world_size()
    own = {"attempt": uuid.uuid4().hex, "address": ray.util.get_node_ip_address(), "port": free_port()}
    first = broadcast_from_rank_zero(own if node == 0 else None)
    place = Place(node, nodes, job.ranks_per_node, first["address"], first["port"])
    return stay(job, place, lambda method, *said: _call(ray, job.desk, method, first["attempt"], *said))


def _call(ray: Any, desk: Any, method: str, *said: Any) -> Any:
    return ray.get(getattr(desk, method).remote(*said), timeout=_CALL_S)


def stay(job: NodeJob, place: Place, ask: Callable[..., Any]) -> int:
    """Start a node's ranks, pass on what they print and what they are told, until they have ended.

    Args:
        ask: calls a method of the desk.
    """
    if ask("begin", list(place.ranks)):
        return STOPPED
    ranks = Ranks([sys.executable, "-m", *job.module], place, Path(job.logs), Path(job.home), job.env)
    try:
        return _watch(job, place, ranks, ask)
    finally:
        ranks.end(0.0)


def _watch(job: NodeJob, place: Place, ranks: Ranks, ask: Callable[..., Any]) -> int:
    told: set[int] = set()
    stop_at = leave_at = math.inf
    while True:
        codes = ranks.codes()
        ended = {rank: (code, ranks.last_words(rank)) for rank, code in codes.items() if rank not in told}
        orders: Orders = ask("exchange", ended, ranks.output(0) if 0 in place.ranks else b"")
        told.update(ended)
        now, failed = time.monotonic(), any(codes.values())
        if orders.stop and stop_at == math.inf:
            ranks.signal(signal.SIGTERM)
            stop_at = now + job.stop_s
        if failed or orders.code is not None:
            leave_at = min(leave_at, now + GRACE_S)
        if len(codes) == place.ranks_per_node and (orders.code is not None or not failed):
            return orders.code or 0
        if now > stop_at or (orders.stop and len(codes) == place.ranks_per_node):
            return STOPPED
        if now > leave_at and orders.code is not None:
            return orders.code
        if failed and (orders.all_ended or now > leave_at):
            raise RanksLost(", ".join(f"rank {rank} {how(code)}" for rank, code in codes.items() if code))
        time.sleep(_POLL_S)
