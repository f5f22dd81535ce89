"""Where distribution lives: a small protocol, a plain-torch engine and a DeepSpeed engine."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from sm_train.errors import UserError
from sm_train.train.engines.base import Engine, EngineConfig, TrainState, Update

__all__ = ["Engine", "EngineConfig", "TrainState", "Update", "make_engine"]


def make_engine(
    cfg: EngineConfig, module: nn.Module, trained: nn.Module, lanes: int, state: TrainState | None
) -> Engine:
    """The engine a config names, holding ``module`` and training the parameters of ``trained``, a part of it.

    Args:
        lanes: G, the micro-batches of a step over all ranks.
        state: where to continue from; its weights are copied into ``trained``.

    Raises:
        UserError: the device or the world size does not suit the config.
    """
    from sm_train.train.engines.deepspeed import DeepSpeedEngine
    from sm_train.train.engines.local import LocalEngine

    engines: dict[str, Callable[..., Engine]] = {"local": LocalEngine, "deepspeed": DeepSpeedEngine}
    if cfg.name not in engines:
        raise UserError(f"engine.name is {cfg.name!r}; it must be one of {', '.join(engines)}")
    return engines[cfg.name](cfg, module, trained, lanes, state)
