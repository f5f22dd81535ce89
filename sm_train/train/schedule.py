"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sm_train import config


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then a cosine down to a floor, or constant."""

    lr: float = config.key(1e-4, "peak learning rate")
    warmup_steps: int = config.key(0, "steps of linear warm-up from zero")
    shape: str = config.key("cosine", "after the warm-up: cosine | constant")
    floor: float = config.key(0.0, "share of the peak that the cosine ends at")

    def __post_init__(self) -> None:
        if self.shape not in ("cosine", "constant"):
            raise ValueError(f"schedule.shape is {self.shape!r}; it must be cosine or constant")


def learning_rate(cfg: ScheduleConfig, step: int, num_steps: int) -> float:
    """The rate of optimizer step ``step`` (from 0) of ``num_steps``."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.shape == "constant":
        return cfg.lr
    progress = (step - cfg.warmup_steps) / max(num_steps - cfg.warmup_steps, 1)
    return cfg.lr * (cfg.floor + (1 - cfg.floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
