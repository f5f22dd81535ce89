"""Ranks that share work without training: each does a part alone, and they meet at the beginning and at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sm_train import config
from sm_train.errors import UserError
from sm_train.train.engines import network
from sm_train.train.engines.base import EngineConfig, leave_ranks, start_ranks, sum_over_ranks
from sm_train.train.engines.watch import Watch

_PATIENCE = timedelta(days=7)
"""A rank that is through waits for the others' last pieces; one that is lost is seen by the watch at once."""


@contextmanager
def sharing(device: str, threads: int, facts: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """(rank, how many ranks) inside, from when all are there until all are through; where one fails, all leave.

    Args:
        device: auto | cpu | cuda, where each rank takes its own.
        threads: CPU threads of one rank.
        facts: what the work follows from, JSON-able.

    Raises:
        UserError: the ranks' facts differ.
        Lost: they do not come together.
    """
    limits = EngineConfig(device=device, threads=threads)
    rank, world_size, own = start_ranks(limits)
    watch = Watch(rank, world_size, limits.heartbeat_s, _PATIENCE.total_seconds())
    with network.meeting():
        # By its own group, on CPUs: the ranks' has the patience of their meeting, and NCCL would keep a GPU busy.
        end = dist.new_group(backend="gloo", timeout=_PATIENCE) if world_size > 1 else None
        watch.start(own)
    with watch:
        number = int(config.fingerprint(facts)[:8], 16)
        if sum_over_ranks(torch.tensor([number]), own).tolist() != [world_size * number]:
            raise UserError("the ranks have read different configs, checkpoints or data; give all of them the same")
        yield rank, world_size
        if end is not None:
            dist.barrier(end)
    leave_ranks(watch)
