"""What the training loop asks of an engine, and the frame of ranks around it."""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sm_train import config
from sm_train.data import processes
from sm_train.errors import UserError
from sm_train.models.speech import device_here
from sm_train.records import MicroBatch
from sm_train.train.engines import network
from sm_train.train.engines.watch import Watch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class EngineConfig:
    """How a stage is run on its ranks, and AdamW's constants."""

    name: str = config.key("local", "local (plain torch, any number of ranks) | deepspeed")
    zero_stage: int = config.key(1, "deepspeed: ZeRO stage, 1 to 3; tune's placement decides between 3 and the others")
    offload: bool = config.key(False, "deepspeed, stage 3: weights wait in host memory; tune's placement decides")
    precision: str = config.key("fp32", "fp32 | bf16 | fp16 (deepspeed on a GPU)")
    device: str = config.key("auto", "auto | cpu | cuda")
    beta1: float = config.key(0.9, "AdamW: decay of the first moment")
    beta2: float = config.key(0.98, "AdamW: decay of the second moment")
    eps: float = config.key(1e-8, "AdamW: added to the root of the second moment")
    weight_decay: float = config.key(0.01, "AdamW: decoupled weight decay")
    clip: float = config.key(1.0, "gradient norm above which gradients are scaled down; 0 for never")
    split: int = config.key(1, "pieces that a micro-batch is run in: the remedy where it does not fit the memory")
    threads: int = config.key(1, "CPU threads of one rank")
    timeout_s: float = config.key(600.0, "seconds without progress after which ranks leave, naming the one that hangs")
    heartbeat_s: float = config.key(10.0, "seconds of silence after which a rank counts as lost; 0 for no watch")

    def __str__(self) -> str:
        zero = f" ZeRO-{self.zero_stage}" if self.name == "deepspeed" else ""
        return f"{self.name}{zero} {self.precision}"

    def __post_init__(self) -> None:
        if self.precision not in DTYPES:
            raise ValueError(f"engine.precision is {self.precision!r}; it must be one of {', '.join(DTYPES)}")
        for name in ("threads", "split"):
            if getattr(self, name) < 1:
                raise ValueError(f"engine.{name} is {getattr(self, name)}; it must be at least 1")
        if self.zero_stage not in (1, 2, 3):
            raise ValueError(f"engine.zero_stage is {self.zero_stage}; it must be 1, 2 or 3")
        if self.offload and self.zero_stage != 3:
            raise ValueError(f"engine.offload needs engine.zero_stage 3; it is {self.zero_stage}")
        for name in ("timeout_s", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"engine.{name} is {getattr(self, name)}; it must be a number from 0 on")
        if self.timeout_s < 1:
            raise ValueError(f"engine.timeout_s is {self.timeout_s}; it must be at least 1")
        if self.heartbeat_s != 0 and not 1 <= self.heartbeat_s < math.inf:
            raise ValueError(f"engine.heartbeat_s is {self.heartbeat_s}; it must be at least 1, or 0 for no watch")

    @property
    def patience(self) -> timedelta:
        """When a collective gives up by itself: after the watch, which knows whose fault it is."""
        return timedelta(seconds=self.timeout_s + self.heartbeat_s + 5)


@dataclass
class TrainState:
    """What training continues from, free of any engine: fp32 tensors on the CPU, by parameter name."""

    weights: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    adam_step: int
    scaler: dict[str, float] | None = None
    """The dynamic loss scale of fp16: cur_scale, cur_iter, last_overflow_iter, cur_hysteresis."""


@dataclass(frozen=True, slots=True)
class Update:
    """What one optimizer step did."""

    grad_norm: float
    applied: bool
    scale: float


class Engine(Protocol):
    """Runs a module on this rank and its like on the others; the only thing that knows there are others.

    It is made before the module, so that ranks have met and frozen models can be loaded in ``building()``.
    """

    rank: int
    world_size: int
    device: torch.device
    split: int
    """Pieces of a micro-batch, each with a forward and a backward."""
    module: nn.Module
    watch: Watch
    """Put it around training, ``with engine.watch: ...``, between prepare and close."""

    def building(self) -> AbstractContextManager[None]:
        """Models that are loaded inside are laid out over the ranks as the engine's config says."""

    def prepare(self, module: nn.Module, trained: nn.Module, state: TrainState | None) -> None:
        """Take ``module`` and train the parameters of ``trained``, a part of it.

        Args:
            state: where to continue from; its weights are copied into ``trained``.
        """

    def forward(self, batch: MicroBatch) -> dict[str, Tensor]:
        """The module's sums for one micro-batch."""

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add this piece's gradient: those of all pieces, micro-batches and ranks are summed, not averaged.

        Every rank must call it equally often: ``split`` times for each micro-batch.
        """

    def step(self, lr: float) -> Update:
        """Update the weights, unless the gradient is not finite; gradients are cleared either way."""

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The element-wise sum of a small tensor over ranks."""

    def capture(self) -> TrainState | None:
        """A copy of the state, on rank 0; None elsewhere. Every rank must call it."""

    def gradients(self) -> Mapping[str, Tensor]:
        """The summed gradients in fp32, between the last backward and the step. Every rank must call it."""

    def close(self) -> None:
        """Leave the group of ranks."""


def place() -> tuple[int, int]:
    """This process's rank and the world size, as the environment names them (torchrun's variables)."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@network.meeting()
def start_ranks(cfg: EngineConfig) -> tuple[int, int, torch.device]:
    """Join the ranks that the environment names (torchrun's variables), or stand alone.

    Returns:
        rank, world size, this rank's device.

    Raises:
        Lost: they do not come together.
    """
    _die_with_launcher()
    torch.set_num_threads(cfg.threads)
    rank, world_size = place()
    device = device_here(cfg.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=cfg.patience)
    return rank, world_size, device


def _die_with_launcher() -> None:
    """Under torchrun, end when it ends: a launcher that is killed would leave its ranks at work (Linux only)."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        launcher = os.getppid()
        processes.die_with(launcher)
        if launcher == 1 and not _is_python(1):  # it was dead before it was asked for
            os.kill(os.getpid(), signal.SIGKILL)


def _is_python(pid: int) -> bool:
    """Whether a process runs our interpreter: in a container, torchrun may well be process 1."""
    try:
        return os.path.samefile(f"/proc/{pid}/exe", sys.executable)
    except OSError:
        return False


def leave_ranks(watch: Watch | None = None) -> None:
    """Leave the group once every rank is here, and then the watch."""
    if dist.is_initialized():
        with watch or nullcontext():
            dist.barrier()
        if watch:
            watch.close()
        dist.destroy_process_group()


def sum_over_ranks(values: Tensor, device: torch.device) -> Tensor:
    """The element-wise sum over ranks of a small CPU tensor, in float64."""
    values = values.to(torch.float64, copy=True)
    if dist.is_initialized() and dist.get_world_size() > 1:
        on_device = values.to(device)
        dist.all_reduce(on_device)
        values = on_device.cpu()
    return values


@network.meeting()
def require_one_start(engine: Engine, run: Path, step: int, contract: Mapping[str, Any]) -> None:
    """Raises UserError unless all ranks have read the checkpoint of the same step, and the same data and models."""
    start = [step, int(config.fingerprint(contract)[:8], 16)]
    if engine.sum_over_ranks(torch.tensor(start)).tolist() != [engine.world_size * value for value in start]:
        raise UserError(
            f"run {run}: its ranks have read different checkpoints (this one step {step}), data or models; end the "
            "attempt that still writes there, or put them on a file system that all ranks share"
        )


def fresh_state(trained: nn.Module) -> TrainState:
    """The state of a run's first step: the module's weights in fp32, moments of zero."""
    names, weights = zip(*trained.named_parameters(), strict=True)
    average, square = (named_tensors(names, [torch.zeros_like(w) for w in weights]) for _ in range(2))
    return TrainState(named_tensors(names, weights), average, square, adam_step=0)


def copy_weights(trained: nn.Module, state: TrainState) -> None:
    """Put a state's weights into a module.

    Raises:
        UserError: names or shapes differ.
    """
    own = dict(trained.named_parameters())
    for name in sorted({*own, *state.weights}):
        shapes = [tuple(d[name].shape) if name in d else None for d in (own, state.weights)]
        if shapes[0] != shapes[1]:
            raise UserError(f"checkpoint: parameter {name!r} has the shape {shapes[1]}, the mapper's is {shapes[0]}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state.weights[name])


def named_tensors(names: Any, tensors: Any) -> dict[str, Tensor]:
    """Copies on the CPU in fp32, by name."""
    return {name: t.detach().to("cpu", torch.float32, copy=True) for name, t in zip(names, tensors, strict=True)}
