"""The training loop: it knows neither the objective nor how ranks talk.

One step: every rank runs its lanes' micro-batches, one small all-reduce brings losses and flags together, and the
weights move only if every loss is finite. The gradient of a step is the same for any number of ranks.
"""

from __future__ import annotations

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
from sm_train.train import checkpoint
from sm_train.train.engines import Engine, Update
from sm_train.train.objectives import Objective
from sm_train.train.schedule import ScheduleConfig, learning_rate

_SKIPS_IN_A_ROW = 20
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

    def __post_init__(self) -> None:
        if self.nonfinite not in ("stop", "skip"):
            raise ValueError(f"loop.nonfinite is {self.nonfinite!r}; it must be stop or skip")
        for name in ("steps", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"loop.{name} is {getattr(self, name)}; it must be at least 1")


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
) -> None:  # fmt: skip
    """Train from the run's position to the last step.

    Raises:
        UserError: a loss (or, with nonfinite: stop, a gradient) is not finite; it names the utterances.
    """
    engine.module.train()
    clock = _Clock()
    stall: dict[str, float] = {}
    for step in loader.steps(run.position):
        if run.global_step >= cfg.steps:
            break
        line = _take_step(cfg, schedule, engine, objective, loader, step, run)
        line.update({**clock.tick(step), **stall})
        is_last, is_best = run.global_step == cfg.steps, False
        if validate is not None and (run.global_step % cfg.validate_every == 0 or is_last):
            line.update(found := validate())
            judged_by = next(iter(found.values()))
            is_best = math.isfinite(judged_by) and (run.best_valid is None or judged_by < run.best_valid)
            run.best_valid = judged_by if is_best else run.best_valid
        if log is not None:
            log.write(run.global_step, line)
        # After the line: a run killed in between then has both or neither, as lines beyond the checkpoint are cut off.
        stall = {}
        if run.global_step % cfg.save_every == 0 or is_last or is_best:
            stall["checkpoint_s"] = _save(engine, run, is_best=is_best, keep=cfg.keep)
        if run.global_step % cfg.log_every == 0 or any(name in line for name in _SHOWN) or is_last:
            say(_terminal_line(run.global_step, cfg.steps, line, clock.steps_per_s))


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
    cfg: LoopConfig,
    schedule: ScheduleConfig,
    engine: Engine,
    objective: Objective,
    loader: Loader,
    step: Step,
    run: Run,
) -> dict[str, float]:
    begun = time.perf_counter()
    losses = _forward_backward(engine, objective, loader, step, run.seed)
    lr = learning_rate(schedule, run.global_step, cfg.steps)
    update = engine.step(lr)
    _check_update(cfg, update, loader, step, run)
    run.global_step += 1
    run.position = Position(step.position.epoch, step.position.step + 1)
    return {
        **losses,
        "epoch": step.position.epoch,
        "grad_norm": update.grad_norm,
        "lr": lr,
        "scale": update.scale,
        "skipped": int(not update.applied),
        "step_s": time.perf_counter() - begun + step.wait_s,
        "peak_memory_mb": _peak_memory_mb(engine.device),
    }


def _forward_backward(engine: Engine, objective: Objective, loader: Loader, step: Step, seed: int) -> dict[str, float]:
    """Gradients of a whole step, and its losses by term over all ranks.

    Raises:
        UserError: a loss is not finite on some rank.
    """
    terms = [*objective.weights, *objective.measures]
    # Sums by term, then a flag for each lane whose loss is not finite.
    report = torch.zeros(len(terms) + loader.lanes, dtype=torch.float64)
    for number, (lane, batch) in enumerate(step.batches, start=1):
        torch.manual_seed(_dropout_seed(seed, step.position, lane))
        sums = engine.forward(batch)
        parts = [weight / step.counts[t] * sums[t] for t, weight in objective.weights.items() if step.counts[t] > 0]
        loss = torch.stack(parts).sum()
        engine.backward(loss, is_last=number == len(step.batches))
        report[: len(terms)] += torch.stack([sums[t].detach() for t in terms]).double().cpu()
        report[len(terms) + lane] = float(not torch.isfinite(loss.detach()))
    report = engine.sum_over_ranks(report)
    bad_lanes = [lane for lane in range(loader.lanes) if report[len(terms) + lane] > 0]
    if bad_lanes:
        raise UserError(
            f"the loss is not finite at epoch {step.position.epoch}, step {step.position.step}, lane "
            f"{', '.join(map(str, bad_lanes))}: utterances {loader.names(step.position, bad_lanes)}"
        )
    means = {t: float(report[i]) / step.counts[t] for i, t in enumerate(terms) if step.counts[t] > 0}
    total = sum(weight * means[t] for t, weight in objective.weights.items() if t in means)
    return {"loss": total, **{t if t in objective.measures else f"loss_{t}": mean for t, mean in means.items()}}


def _dropout_seed(seed: int, position: Position, lane: int) -> int:
    words = (seed, position.epoch, position.step, lane)
    return int.from_bytes(bytes.fromhex(config.fingerprint({"dropout": words})), "big") >> 1


def _check_update(cfg: LoopConfig, update: Update, loader: Loader, step: Step, run: Run) -> None:
    run.skips_in_a_row = 0 if update.applied else run.skips_in_a_row + 1
    if update.applied or (update.scale != 1.0 and run.skips_in_a_row <= _SKIPS_IN_A_ROW):
        return
    where = f"epoch {step.position.epoch}, step {step.position.step}"
    if cfg.nonfinite == "skip" and run.skips_in_a_row <= _SKIPS_IN_A_ROW:
        say(f"warning: the gradient is not finite at {where}: no update")
        return
    names = loader.names(step.position, list(range(loader.lanes)))
    raise UserError(
        f"the gradient is not finite at {where} (skipped {run.skips_in_a_row} in a row), utterances {names}; "
        "lower schedule.lr or raise schedule.warmup_steps, or set loop.nonfinite=skip"
    )


def _save(engine: Engine, run: Run, *, is_best: bool, keep: int) -> float:
    """Save on rank 0; the wall seconds that training stood still."""
    begun = time.perf_counter()
    state = engine.capture()
    if state is not None:
        saved = checkpoint.Checkpoint(state, run.global_step, run.position, run.contract, run.best_valid)
        checkpoint.save(run.folder, run.attempt, saved, run.description, is_best=is_best, keep=keep)
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
