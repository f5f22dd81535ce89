"""Plain torch on any number of ranks, one all-reduce of the flat gradient: the reference for other engines."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from sm_train.errors import UserError
from sm_train.records import MicroBatch
from sm_train.train.engines import base, network
from sm_train.train.engines.watch import Watch


class LocalEngine:
    """Weights in the config's precision, masters and gradients in fp32, AdamW replicated on every rank."""

    def __init__(self, cfg: base.EngineConfig, lanes: int) -> None:
        if cfg.precision == "fp16":
            raise UserError("engine.precision fp16 needs engine.name deepspeed, which scales the loss; or take bf16")
        self.cfg, self.split = cfg, cfg.split
        self.rank, self.world_size, self.device = base.start_ranks(cfg)
        self.watch = Watch(self.rank, self.world_size, cfg.heartbeat_s, cfg.timeout_s)

    def building(self) -> AbstractContextManager[None]:
        return nullcontext()

    @network.meeting()
    def prepare(self, module: nn.Module, trained: nn.Module, state: base.TrainState | None) -> None:
        cfg = self.cfg
        state = state or base.fresh_state(trained)
        base.copy_weights(trained, state)
        dtype = base.DTYPES[cfg.precision]
        self.module = module.to(self.device)
        self.names = [name for name, _ in trained.named_parameters()]
        self.masters = [p.detach().to(self.device, torch.float32, copy=True) for p in trained.parameters()]
        trained.to(dtype)
        self.weights = list(trained.parameters())
        self.sizes = [p.numel() for p in self.weights]
        self.flat = torch.zeros(sum(self.sizes), device=self.device)
        pieces = torch.split(self.flat, self.sizes)
        self.grads = [grad.view_as(master) for grad, master in zip(pieces, self.masters, strict=True)]
        self.exp_avg = [state.exp_avg[name].to(self.device, copy=True) for name in self.names]
        self.exp_avg_sq = [state.exp_avg_sq[name].to(self.device, copy=True) for name in self.names]
        self.steps = [torch.tensor(float(state.adam_step)) for _ in self.names]
        self.watch.start(self.device)

    def forward(self, batch: MicroBatch) -> dict[str, Tensor]:
        self.watch.mark("forward")
        sums: dict[str, Tensor] = self.module(batch.to(self.device))
        return sums

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        self.watch.mark("backward")
        loss.backward()  # type: ignore[no-untyped-call]
        for weight, grad in zip(self.weights, self.grads, strict=True):
            if weight.grad is not None:
                grad += weight.grad
                weight.grad = None
        if is_last and self.world_size > 1:
            dist.all_reduce(self.flat)

    def step(self, lr: float) -> base.Update:
        self.watch.mark("step")
        norm = float(torch.linalg.vector_norm(self.flat, dtype=torch.float64))  # fp32 loses 2e-4 in 3M entries
        applied = norm < float("inf")
        if applied:
            if self.cfg.clip and norm + 1e-6 > self.cfg.clip:
                self.flat /= (norm + 1e-6) / self.cfg.clip
            with torch.no_grad():
                self._update(lr)
                for weight, master in zip(self.weights, self.masters, strict=True):
                    weight.copy_(master)
        self.flat.zero_()
        return base.Update(norm, applied, 1.0)

    def _update(self, lr: float) -> None:
        """AdamW's own function: its class would import torch's compiler, a second of every start."""
        cfg = self.cfg
        adamw(
            self.masters, self.grads, self.exp_avg, self.exp_avg_sq, [], self.steps, amsgrad=False, maximize=False,
            beta1=cfg.beta1, beta2=cfg.beta2, lr=lr, weight_decay=cfg.weight_decay, eps=cfg.eps,
        )  # fmt: skip

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        self.watch.mark("sum_over_ranks")
        return base.sum_over_ranks(values, self.device)

    def capture(self) -> base.TrainState | None:
        self.watch.mark("capture")
        if self.rank != 0:
            return None
        return base.TrainState(
            base.named_tensors(self.names, self.masters),
            base.named_tensors(self.names, self.exp_avg),
            base.named_tensors(self.names, self.exp_avg_sq),
            int(self.steps[0]),
        )

    def gradients(self) -> Mapping[str, Tensor]:
        self.watch.mark("gradients")
        return base.named_tensors(self.names, self.grads)

    def close(self) -> None:
        self.watch.mark("close")
        base.leave_ranks(self.watch)
