"""The stages as commands: what has ranks, and what one process of a stage runs."""

from __future__ import annotations

TRAINING = ("pretrain", "tune")
"""Stages that run on several ranks."""
PORTS = range(20_000, 32_000)
"""Where ranks meet: below the ports that kernels hand out by themselves."""


def module(stage: str) -> str:
    """What follows ``python -m`` where a stage is one command on one machine."""
    return f"{'cluster' if stage in ('precompute', 'retarget') else 'sm_train'}.{stage}"
