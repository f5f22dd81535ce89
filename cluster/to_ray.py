"""Submission to a Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sm_train import config
from sm_train.errors import UserError

if TYPE_CHECKING:
    from cluster.submission import Job


@dataclass(frozen=True)
class RayConfig:
    """What a Ray cluster is asked."""

    address: str = config.key("", "of the cluster")


def check(job: Job) -> None:
    """Raises UserError: what a Ray cluster would refuse."""
    raise UserError("to=ray is not built yet")


def script(job: Job) -> str:
    """What would be sent."""
    raise UserError("to=ray is not built yet")


def send(job: Job) -> None:
    """Send it."""
    raise UserError("to=ray is not built yet")
