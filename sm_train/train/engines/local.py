"""Plain torch on any number of ranks, one all-reduce of the flat gradient: the reference for other engines."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sm_train.errors import UserError
from sm_train.records import MicroBatch
from sm_train.train.engines import base
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
        for master, grad in zip(self.masters, torch.split(self.flat, self.sizes), strict=True):
            master.grad = grad.view_as(master)
        self.optimizer = torch.optim.AdamW(
            self.masters, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, weight_decay=cfg.weight_decay
        )
        for name, master in zip(self.names, self.masters, strict=True):
            self.optimizer.state[master] = {
                "step": torch.tensor(float(state.adam_step)),
                "exp_avg": state.exp_avg[name].to(self.device, copy=True),
                "exp_avg_sq": state.exp_avg_sq[name].to(self.device, copy=True),
            }
        self.watch.start(self.device)

    def forward(self, batch: MicroBatch) -> dict[str, Tensor]:
        self.watch.mark("forward")
        sums: dict[str, Tensor] = self.module(batch.to(self.device))
        return sums

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        self.watch.mark("backward")
        loss.backward()  # type: ignore[no-untyped-call]
        for weight, master in zip(self.weights, self.masters, strict=True):
            if weight.grad is not None and master.grad is not None:
                master.grad += weight.grad
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
            self.optimizer.param_groups[0]["lr"] = lr
            self.optimizer.step()
            with torch.no_grad():
                for weight, master in zip(self.weights, self.masters, strict=True):
                    weight.copy_(master)
        self.flat.zero_()
        return base.Update(norm, applied, 1.0)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        self.watch.mark("sum_over_ranks")
        return base.sum_over_ranks(values, self.device)

    def capture(self) -> base.TrainState | None:
        self.watch.mark("capture")
        if self.rank != 0:
            return None
        states = [self.optimizer.state[master] for master in self.masters]
        return base.TrainState(
            base.named_tensors(self.names, self.masters),
            base.named_tensors(self.names, [s["exp_avg"] for s in states]),
            base.named_tensors(self.names, [s["exp_avg_sq"] for s in states]),
            int(states[0]["step"]),
        )

    def gradients(self) -> Mapping[str, Tensor]:
        self.watch.mark("gradients")
        return base.named_tensors(self.names, [master.grad for master in self.masters])

    def close(self) -> None:
        self.watch.mark("close")
        base.leave_ranks(self.watch)
