"""The state inside DeepSpeed 0.19's ZeRO-1 and 2 optimizers: the one file that knows their private names.

DeepSpeed's own checkpoints are pickles bound to the number of ranks; ours are dictionaries of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import nn

from sm_train.train.engines.base import TrainState, named_tensors

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def partitions(zero: Any) -> list[torch.Tensor]:
    """This rank's flat fp32 masters; ZeRO-1 in bf16 is a class of its own, with a name of its own for them."""
    found: list[torch.Tensor] | None = getattr(zero, "single_partition_of_fp32_groups", None)
    return zero.fp32_groups_flat_partition if found is None else found


def loss_scale(zero: Any) -> float:
    """The scale of the loss: 1 but in fp16."""
    return float(getattr(zero, "loss_scale", 1.0))


def capture(zero: Any, names: Sequence[str], weights: Sequence[nn.Parameter]) -> TrainState:
    """The whole state, gathered from all ranks on all ranks; every rank must call it."""
    average, square = (
        named_tensors(names, [safe_get_full_optimizer_state(weight, moment) for weight in weights])
        for moment in ("exp_avg", "exp_avg_sq")
    )
    masters = named_tensors(names, [safe_get_full_fp32_param(weight) for weight in weights])
    adam_step = int(zero.optimizer.state[partitions(zero)[0]]["step"])
    return TrainState(masters, average, square, adam_step, _scaler_state(zero))


def restore(zero: Any, names: Sequence[str], weights: Sequence[nn.Parameter], state: TrainState) -> None:
    """Put a state into a fresh ZeRO optimizer whose module holds its weights already."""
    for flat in partitions(zero):
        zero.optimizer.state[flat] = {
            "step": torch.tensor(float(state.adam_step)),
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()
    for name, weight in zip(names, weights, strict=True):
        safe_set_full_fp32_param(weight, state.weights[name].to(weight.device))
        safe_set_full_optimizer_state(weight, state.exp_avg[name].to(weight.device), "exp_avg")
        safe_set_full_optimizer_state(weight, state.exp_avg_sq[name].to(weight.device), "exp_avg_sq")
    if state.scaler is not None and _scaler_state(zero) is not None:
        for field in _SCALER:
            kind = type(getattr(zero.loss_scaler, field))
            setattr(zero.loss_scaler, field, kind(state.scaler[field]))


def _scaler_state(zero: Any) -> dict[str, float] | None:
    if not getattr(getattr(zero, "loss_scaler", None), "dynamic", False):
        return None
    return {field: float(getattr(zero.loss_scaler, field)) for field in _SCALER}
