"""One step: every rank runs its lanes' micro-batches, one small all-reduce brings losses and flags together, and the
weights move only if every loss is finite. The gradient of a step is the same for any number of ranks."""

from __future__ import annotations

import torch

from sm_train import config
from sm_train.data.loader import Loader, Step
from sm_train.data.plan import Position
from sm_train.errors import UserError
from sm_train.records import MicroBatch
from sm_train.runlog import say
from sm_train.train.engines import Engine, Update
from sm_train.train.objectives import Objective

_SKIPS_IN_A_ROW = 20


def forward_backward(
    engine: Engine, objective: Objective, loader: Loader, step: Step, seed: int, flags: tuple[bool, ...] = ()
) -> tuple[dict[str, float], tuple[bool, ...]]:
    """Gradients of a whole step.

    Args:
        flags: what this rank has to say to all: all learn of a raised flag in the same step.

    Returns:
        Losses by term over all ranks, with their weighted sum under ``loss``; each flag, if any rank has raised it.

    Raises:
        UserError: a loss is not finite on some rank, or the device's memory is full.
    """
    terms = [*objective.weights, *objective.measures]
    lanes = range(len(terms), len(terms) + loader.lanes)
    # Sums by term, then for each lane whether its loss is not finite, then the flags.
    report = torch.zeros(len(terms) + loader.lanes + len(flags), dtype=torch.float64)
    report[lanes.stop :] = torch.tensor(flags)
    for number, (lane, batch) in enumerate(step.batches, start=1):
        torch.manual_seed(dropout_seed(seed, step.position, lane))
        try:
            sums, is_finite = _micro_batch(engine, objective, batch, step, is_last=number == len(step.batches))
        except torch.OutOfMemoryError as error:
            raise UserError(_no_memory(engine, loader, step, lane, error)) from None
        report[: len(terms)] += torch.stack([sums[t] for t in terms]).double().cpu()
        report[lanes[lane]] = float(not is_finite)
    report = engine.sum_over_ranks(report)
    bad_lanes = [lane for lane, place in enumerate(lanes) if report[place] > 0]
    if bad_lanes:
        raise UserError(
            f"the loss is not finite at epoch {step.position.epoch}, step {step.position.step}, lane "
            f"{', '.join(map(str, bad_lanes))}: utterances {loader.names(step.position, bad_lanes)}"
        )
    means = {t: float(report[i]) / step.counts[t] for i, t in enumerate(terms) if step.counts[t] > 0}
    total = sum(weight * means[t] for t, weight in objective.weights.items() if t in means)
    named = {t if t in objective.measures else f"loss_{t}": mean for t, mean in means.items()}
    return {"loss": total, **named}, tuple(bool(value) for value in report[lanes.stop :] > 0)


def _micro_batch(
    engine: Engine, objective: Objective, batch: MicroBatch, step: Step, *, is_last: bool
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Run a micro-batch in ``engine.split`` pieces; its sums by term, and whether its loss is finite."""
    pieces = batch.split(engine.split)
    terms = {*objective.weights, *objective.measures}
    totals: dict[str, torch.Tensor] = {}
    is_finite = torch.tensor(True)
    for number in range(engine.split):
        # Every rank takes equally many passes, as ZeRO asks: where items are fewer than pieces, one is run for nothing.
        counts = float(number < len(pieces))
        sums = engine.forward(pieces[number if counts else 0])
        if missing := sorted(terms - set(sums)):
            raise UserError(f"the loss names the terms {sorted(terms)}, but its forward gives no {', '.join(missing)}")
        parts = [w / step.counts[t] * sums[t] for t, w in objective.weights.items() if step.counts[t] > 0]
        loss = counts * torch.stack(parts).sum()
        engine.backward(loss, is_last=is_last and number == engine.split - 1)
        is_finite = is_finite & torch.isfinite(loss.detach()).cpu()
        for term, value in sums.items():
            totals[term] = totals.get(term, 0.0) + counts * value.detach()
    return totals, is_finite


def _no_memory(engine: Engine, loader: Loader, step: Step, lane: int, error: Exception) -> str:
    items = loader.planner.epoch(step.position.epoch).micro_batch(step.position.step, lane)
    size = f"{len(items)} items of up to {int(loader.lengths[items].max())} {loader.items.unit}"
    return (
        f"the memory of {engine.device} is full in lane {lane} of epoch {step.position.epoch}, step "
        f"{step.position.step}: {size} ({str(error).splitlines()[0]}); the same command with "
        f"engine.split={2 * engine.split} goes on in smaller pieces, with the same gradients"
    )


def dropout_seed(seed: int, position: Position, lane: int) -> int:
    """The seed of one micro-batch's dropout: the same on whatever rank it is run."""
    words = (seed, position.epoch, position.step, lane)
    return int.from_bytes(bytes.fromhex(config.fingerprint({"dropout": words})), "big") >> 1


def check_update(nonfinite: str, update: Update, loader: Loader, step: Step, skips_in_a_row: int) -> int:
    """Judge what an optimizer step did.

    Args:
        nonfinite: what a gradient that is not finite does: stop | skip. In fp16 it is the scaler at work.

    Returns:
        Updates skipped in a row, this one counted.

    Raises:
        UserError: the gradient is not finite; it names the utterances.
    """
    if update.applied:
        return 0
    skips = skips_in_a_row + 1
    if update.scale != 1.0 and skips <= _SKIPS_IN_A_ROW:
        return skips
    where = f"epoch {step.position.epoch}, step {step.position.step}"
    if nonfinite == "skip" and skips <= _SKIPS_IN_A_ROW:
        say(f"warning: the gradient is not finite at {where}: no update")
        return skips
    names = loader.names(step.position, list(range(loader.lanes)))
    raise UserError(
        f"the gradient is not finite at {where} (skipped {skips} in a row), utterances {names}; "
        "lower schedule.lr or raise schedule.warmup_steps, or set loop.nonfinite=skip"
    )
