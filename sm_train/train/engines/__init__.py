"""Where distribution lives: a small protocol, a plain-torch engine and a DeepSpeed engine."""

from __future__ import annotations

from collections.abc import Callable

from sm_train.errors import UserError
from sm_train.train.engines.base import Engine, EngineConfig, TrainState, Update

__all__ = ["Engine", "EngineConfig", "TrainState", "Update", "make_engine"]


def make_engine(cfg: EngineConfig, lanes: int) -> Engine:
    """The engine a config names, its ranks met.

    Args:
        lanes: G, the micro-batches of a step over all ranks.

    Raises:
        UserError: the device or the world size does not suit the config.
    """
    from sm_train.train.engines.deepspeed import DeepSpeedEngine
    from sm_train.train.engines.local import LocalEngine

    engines: dict[str, Callable[[EngineConfig, int], Engine]] = {"local": LocalEngine, "deepspeed": DeepSpeedEngine}
    if cfg.name not in engines:
        raise UserError(f"engine.name is {cfg.name!r}; it must be one of {', '.join(engines)}")
    return engines[cfg.name](cfg, lanes)
