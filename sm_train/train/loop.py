"""The training loop: it knows neither the objective nor how ranks talk.

Step after step until the last one, with a line in metrics.jsonl for each, validation and checkpoints once in a while;
a signal, or trouble with the disk, ends it on all ranks after the same step.
"""

from __future__ import annotations

import itertools
import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sm_train import config
from sm_train.data.loader import Loader, Step
from sm_train.data.plan import Position
from sm_train.errors import UserError
from sm_train.runlog import RunLog, clock, say
from sm_train.train.checkpoint import Checkpoint
from sm_train.train.engines import Engine
from sm_train.train.objectives import Objective
from sm_train.train.saver import Saver
from sm_train.train.schedule import ScheduleConfig, learning_rate
from sm_train.train.signals import StopRequest
from sm_train.train.step import check_update, forward_backward

_SHOWN = {"valid_ce": "valid CE {:.3f}", "valid_accuracy": "accuracy {:.3f}", "valid_wer": "valid WER {:.1%}"}


@dataclass(frozen=True)
class LoopConfig:
    """How long a run is and what it does besides training."""

    steps: int = config.key(2_000_000, "optimizer steps of the whole run")
    log_every: int = config.key(10, "steps between lines on the terminal; metrics.jsonl has every step")
    save_every: int = config.key(200, "steps between checkpoints; the last step always has one")
    validate_every: int = config.key(200, "steps between validations; 0 for never")
    keep: int = config.key(2, "newest checkpoints to keep, besides the best")
    nonfinite: str = config.key("stop", "what a non-finite gradient does: stop | skip")
    save_error: str = config.key("stop", "what a disk that is full or fails does: stop | go_on (and try the next save)")

    def __post_init__(self) -> None:
        for name, choices in (("nonfinite", ("stop", "skip")), ("save_error", ("stop", "go_on"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"loop.{name} is {getattr(self, name)!r}; it must be {' or '.join(choices)}")
        for name in ("steps", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"loop.{name} is {getattr(self, name)}; it must be at least 1")
        if self.validate_every < 0:
            raise ValueError(f"loop.validate_every is {self.validate_every}; it must be 0 or more")


@dataclass
class Run:
    """Everything the loop is given, and what of it a checkpoint must remember."""

    folder: Path
    attempt: int
    seed: int
    contract: dict[str, Any]
    description: dict[str, object]
    global_step: int = 0
    position: Position = Position(0, 0)
    best_valid: float | None = None
    """The lowest value so far of what validation names first."""
    skips_in_a_row: int = 0


def train(
    cfg: LoopConfig, schedule: ScheduleConfig, engine: Engine, objective: Objective, loader: Loader, run: Run,
    log: RunLog | None, validate: Callable[[], dict[str, float]] | None,
) -> str | None:  # fmt: skip
    """Train from the run's position to the last step.

    Returns:
        What asked it to save and leave before the last step, as SIGTERM; None if nothing did.

    Raises:
        UserError: a loss (or, with nonfinite: stop, a gradient) is not finite, or the run folder cannot be written.
    """
    engine.module.train()
    clock = _Clock()
    stall: dict[str, float] = {}
    must_leave = False
    with StopRequest() as request, Saver(run.folder, run.attempt, run.description, cfg.keep, cfg.save_error) as saver:
        engine.watch.on_leave = saver.before(engine.watch.on_leave)
        for step in itertools.islice(loader.steps(run.position), max(cfg.steps - run.global_step, 0)):
            flags = (request.name is not None, saver.is_in_trouble(), saver.best_is_lost)
            line, (must_leave, in_trouble, best_is_lost) = _take_step(
                cfg, schedule, engine, objective, loader, step, run, flags
            )
            if in_trouble:
                break
            if best_is_lost:
                run.best_valid, saver.best_is_lost = None, False
            line.update({**clock.tick(step), **stall})
            is_last, is_best = run.global_step == cfg.steps, False
            if validate is not None and (run.global_step % cfg.validate_every == 0 or is_last):
                line.update(found := validate())
                is_best = _is_best(run, next(iter(found.values())))
            if log is not None:
                with saver.guarded("metrics.jsonl"):
                    log.write(run.global_step, line)
            # After the line: a run killed in between has both or neither, as lines beyond the checkpoint are cut off.
            stall = {}
            if run.global_step % cfg.save_every == 0 or is_last or is_best or must_leave:
                stall["checkpoint_s"] = _save(engine, run, saver, is_best=is_best)
            if run.global_step % cfg.log_every == 0 or any(name in line for name in _SHOWN) or is_last:
                if engine.rank == 0:
                    saver.require_current()
                say(_terminal_line(run.global_step, cfg.steps, line, clock.steps_per_s))
            if must_leave:
                break
    _require_written(engine, saver)
    return (request.name or "a signal to another rank") if must_leave and run.global_step < cfg.steps else None


def _require_written(engine: Engine, saver: Saver) -> None:
    """Raises UserError on every rank if rank 0 could not write, the last checkpoint at the latest."""
    why = saver.trouble or saver.unsaved
    if float(engine.sum_over_ranks(torch.tensor([float(why is not None)]))) > 0:
        raise UserError(why or "rank 0 cannot write the run folder; its own line says why")


def _is_best(run: Run, judged_by: float) -> bool:
    is_best = math.isfinite(judged_by) and (run.best_valid is None or judged_by < run.best_valid)
    run.best_valid = judged_by if is_best else run.best_valid
    return is_best


class _Clock:
    """Steps and audio against wall time since this attempt's first step."""

    def __init__(self) -> None:
        self.start, self.steps, self.audio_s = time.monotonic(), 0, 0.0

    def tick(self, step: Step) -> dict[str, float]:
        """Count a step; what the log says of its speed."""
        self.steps += 1
        self.audio_s += step.audio_s
        elapsed_s = time.monotonic() - self.start
        return {"audio_h_per_s": self.audio_s / 3600 / elapsed_s, "loader_wait_s": step.wait_s, "padding": step.padding}

    @property
    def steps_per_s(self) -> float:
        """The mean rate."""
        return self.steps / (time.monotonic() - self.start)


def _take_step(
    cfg: LoopConfig, schedule: ScheduleConfig, engine: Engine, objective: Objective, loader: Loader, step: Step,
    run: Run, flags: tuple[bool, ...],
) -> tuple[dict[str, Any], tuple[bool, ...]]:  # fmt: skip
    """One step; what the log says of it, and each flag if any rank has raised it: such a step is still taken."""
    begun = time.perf_counter()
    losses, raised = forward_backward(engine, objective, loader, step, run.seed, flags)
    lr = learning_rate(schedule, run.global_step, cfg.steps)
    update = engine.step(lr)
    run.skips_in_a_row = check_update(cfg.nonfinite, update, loader, step, run.skips_in_a_row)
    run.global_step += 1
    run.position = Position(step.position.epoch, step.position.step + 1)
    line = {
        **losses,
        "epoch": step.position.epoch,
        "items": step.items_hash,
        "num_items": step.num_items,
        "grad_norm": update.grad_norm,
        "lr": lr,
        "scale": update.scale,
        "skipped": int(not update.applied),
        "step_s": time.perf_counter() - begun + step.wait_s,
        "peak_memory_mb": _peak_memory_mb(engine.device),
    }
    return line, raised


def _save(engine: Engine, run: Run, saver: Saver, *, is_best: bool) -> float:
    """Copy the state and let rank 0 write it beside the training; the wall seconds that training stood still."""
    begun = time.perf_counter()
    saver.wait()  # two states at once might not fit the host's memory
    state = engine.capture()
    if state is not None:
        saver.start(Checkpoint(state, run.global_step, run.position, run.contract, run.best_valid), is_best=is_best)
    return time.perf_counter() - begun


def _peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _terminal_line(step: int, steps: int, line: dict[str, Any], steps_per_s: float) -> str:
    left_s = (steps - step) / steps_per_s
    found = "".join(f", {shown.format(line[name])}" for name, shown in _SHOWN.items() if name in line)
    return (
        f"step {step}/{steps}: loss {line['loss']:.4f}, grad norm {line['grad_norm']:.2f}, lr {line['lr']:.1e}, "
        f"{steps_per_s:.2f} steps/s, ETA {clock(left_s)}{found}"
    )
