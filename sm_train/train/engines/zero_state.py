"""The state inside DeepSpeed 0.19's ZeRO optimizers: the one file that knows their private names.

DeepSpeed's own checkpoints are pickles bound to the number of ranks; ours are dictionaries of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn

from sm_train.train.engines.base import TrainState, named_tensors

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def partitions(zero: Any) -> list[torch.Tensor]:
    """This rank's flat fp32 masters: ZeRO-1 and 2, ZeRO-1 in bf16 and ZeRO-3 are three classes with a name each."""
    for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(zero, name):
            return list(getattr(zero, name))
    return list(zero.fp32_partitioned_groups_flat)


def loss_scale(zero: Any) -> float:
    """The scale of the loss: 1 but in fp16."""
    return float(getattr(zero, "loss_scale", 1.0))


def capture(zero: Any, names: Sequence[str], weights: Sequence[nn.Parameter], *, keeps: bool) -> TrainState | None:
    """The whole state, gathered tensor by tensor, on the ranks that keep it; every rank must call it."""
    masters: dict[str, torch.Tensor] = {}
    average: dict[str, torch.Tensor] = {}
    square: dict[str, torch.Tensor] = {}
    for name, weight in zip(names, weights, strict=True):
        for kept, whole in (
            (masters, safe_get_full_fp32_param(weight)),
            (average, safe_get_full_optimizer_state(weight, "exp_avg")),
            (square, safe_get_full_optimizer_state(weight, "exp_avg_sq")),
        ):
            if keeps:
                kept |= named_tensors([name], [whole])
    adam_step = int(zero.optimizer.state[partitions(zero)[0]]["step"])
    return TrainState(masters, average, square, adam_step, _scaler_state(zero)) if keeps else None


def restore(zero: Any, names: Sequence[str], weights: Sequence[nn.Parameter], state: TrainState) -> None:
    """Put a state into a fresh ZeRO optimizer whose module holds its weights already."""
    for flat in partitions(zero):
        zero.optimizer.state[flat] = {
            "step": torch.tensor(float(state.adam_step)),
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        _set_slices(names, weights, state)
    else:
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


def _set_slices(names: Sequence[str], weights: Sequence[nn.Parameter], state: TrainState) -> None:
    """ZeRO-3: each rank sets its own slice of each flat weight, the last one filled up with zeros."""
    for name, weight in zip(names, weights, strict=True):
        partition: torch.Tensor = weight.ds_tensor  # type: ignore[attr-defined]
        first = dist.get_rank() * partition.numel()

        def mine(full: torch.Tensor, first: int = first, like: torch.Tensor = partition) -> torch.Tensor:
            part = full.flatten()[first : first + like.numel()]
            return torch.nn.functional.pad(part, (0, like.numel() - part.numel())).to(like.device)

        safe_set_local_fp32_param(weight, mine(state.weights[name]))
        safe_set_local_optimizer_state(weight, mine(state.exp_avg[name]), "exp_avg")
        safe_set_local_optimizer_state(weight, mine(state.exp_avg_sq[name]), "exp_avg_sq")


def _scaler_state(zero: Any) -> dict[str, float] | None:
    if not getattr(getattr(zero, "loss_scaler", None), "dynamic", False):
        return None
    return {field: float(getattr(zero.loss_scaler, field)) for field in _SCALER}
