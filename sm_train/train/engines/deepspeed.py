"""DeepSpeed ZeRO-1, 2 and 3 behind the engine protocol; only this file and zero_state.py import deepspeed."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sm_train.errors import UserError
from sm_train.models.speech import pick_device
from sm_train.records import MicroBatch
from sm_train.train.engines import base, network
from sm_train.train.engines.watch import Watch

BUCKET = 50_000_000
"""Elements of room for gradients on their way: DeepSpeed's own 5e8 would take 1.9 GiB, twice the paper's mapper."""
REUSE = 0
"""Weights that are used again within so many elements stay whole: DeepSpeed's own 1e9 would keep a small LLM whole."""


class DeepSpeedEngine:
    """AdamW of torch under ZeRO; gradients are accumulated and reduced in fp32 whatever the precision."""

    def __init__(self, cfg: base.EngineConfig, lanes: int) -> None:
        self.rank, self.world_size, self.device = _start(cfg)
        self.watch = Watch(self.rank, self.world_size, cfg.heartbeat_s, cfg.timeout_s)
        self.cfg, self.split = cfg, cfg.split
        self.settings = zero_config(cfg, lanes // self.world_size * cfg.split, self.device)

    @contextmanager
    def building(self) -> Iterator[None]:
        if self.cfg.zero_stage < 3:
            yield
            return
        from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

        # As long as this object lives, from_pretrained partitions each weight over the ranks as it is read.
        alive = HfDeepSpeedConfig(self.settings)
        try:
            yield
        finally:
            unset_hf_deepspeed_config()
            del alive

    @network.meeting()
    def prepare(self, module: nn.Module, trained: nn.Module, state: base.TrainState | None) -> None:
        import deepspeed

        from sm_train.train.engines import zero_state

        self._zero_state = zero_state
        state = state or base.fresh_state(trained)
        base.copy_weights(trained, state)  # before initialize: set after it, the first forward would use the old ones
        trained.to(base.DTYPES[self.cfg.precision])  # initialize casts nothing where a part is partitioned already
        self.names = [name for name, _ in trained.named_parameters()]
        self.weights = list(trained.parameters())
        optimizer = torch.optim.AdamW(
            self.weights, betas=(self.cfg.beta1, self.cfg.beta2), eps=self.cfg.eps, weight_decay=self.cfg.weight_decay
        )
        self.inner: Any = deepspeed.initialize(model=module, optimizer=optimizer, config=self.settings)[0]
        self.module = self.inner.module
        self.zero: Any = self.inner.optimizer
        zero_state.restore(self.zero, self.names, self.weights, state)
        self.watch.start(self.device)

    def forward(self, batch: MicroBatch) -> dict[str, Tensor]:
        self.watch.mark("forward")
        sums: dict[str, Tensor] = self.inner(batch.to(self.device))
        return sums

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        self.watch.mark("backward")
        # DeepSpeed averages over ranks and would divide by the accumulation; the loop's loss is divided already.
        self.inner.backward(loss * self.world_size, scale_wrt_gas=False)
        if not is_last:
            self.inner.step()

    def step(self, lr: float) -> base.Update:
        self.watch.mark("step")
        for group in self.zero.param_groups:
            group["lr"] = lr
        self.inner.step()
        norm = self.inner.get_global_grad_norm()
        return base.Update(float(norm), bool(self.inner.was_step_applied()), self._zero_state.loss_scale(self.zero))

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        self.watch.mark("sum_over_ranks")
        return base.sum_over_ranks(values, self.device)

    def capture(self) -> base.TrainState | None:
        self.watch.mark("capture")
        return self._zero_state.capture(self.zero, self.names, self.weights, keeps=self.rank == 0)

    def gradients(self) -> Mapping[str, Tensor]:
        self.watch.mark("gradients")
        from deepspeed.utils import safe_get_full_grad

        return base.named_tensors(self.names, [safe_get_full_grad(weight) for weight in self.weights])

    def close(self) -> None:
        self.watch.mark("close")
        base.leave_ranks(self.watch)


def zero_config(cfg: base.EngineConfig, micro_batches: int, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's settings for one rank that runs ``micro_batches``, or pieces of them, a step."""
    zero: dict[str, Any] = {"stage": cfg.zero_stage, "reduce_bucket_size": BUCKET}
    if cfg.zero_stage == 3:
        zero["stage3_max_reuse_distance"] = REUSE
    if cfg.offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": cfg.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": cfg.precision == "bf16"},
        "fp16": {"enabled": cfg.precision == "fp16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }


@network.meeting()
def _start(cfg: base.EngineConfig) -> tuple[int, int, torch.device]:
    on_cpu = pick_device(cfg.device) == "cpu"
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        if cfg.precision == "fp16":
            raise UserError("engine.precision fp16 is not supported on a CPU; take fp32 or bf16")
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    warnings.filterwarnings("ignore", category=FutureWarning)
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if on_cpu:
        # Built by a compiler at start-up otherwise, a minute, and it leaves shared memory behind when a run dies.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo" if on_cpu else "nccl", verbose=False, timeout=cfg.patience)
    return base.start_ranks(cfg)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
