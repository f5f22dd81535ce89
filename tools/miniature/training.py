"""The one training loop of the miniature's two models: seeded AdamW, one-cycle, progress lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch

B = TypeVar("B")


Row = dict[str, Any]
"""A line of results.json: system, task, metric, value, low, high (95% interval), count."""


def share_row(system: str, task: str, metric: str, hits: list[bool]) -> Row:
    """A share of successes with its Wilson interval."""
    count, share, z = len(hits), float(np.mean(hits)), 1.96
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5 / (1 + z * z / count)
    return score_row(system, task, metric, share, count, max(0.0, centre - half), min(1.0, centre + half))


def score_row(
    system: str, task: str, metric: str, value: float, count: int, low: float | None = None, high: float | None = None
) -> Row:
    """A line of results.json."""
    return {"system": system, "task": task, "metric": metric, "value": value, "low": low, "high": high, "count": count}


def bucketed(lengths: np.ndarray[Any, Any], batch_size: int, rng: np.random.Generator) -> list[np.ndarray[Any, Any]]:
    """Indices in batches of neighbours in length, in random order; a short last batch is kept."""
    order = rng.permutation(len(lengths))
    order = order[np.argsort(lengths[order], kind="stable")]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [batches[index] for index in rng.permutation(len(batches))]


def fit(
    name: str,
    model: torch.nn.Module,
    batches: Iterator[B],
    loss_of: Callable[[B], torch.Tensor],
    steps: int,
    learning_rate: float,
    warm_up: float,
    check: Callable[[int], str],
    check_every: int,
) -> float:
    """Train ``model`` for ``steps`` steps and return the minutes it took; ``check`` says how well it does, for people.
    ``warm_up`` is the share of the steps in which the learning rate rises.

    Biases, norms and embeddings are not decayed, so that rarely used rows (the pad's) keep their norm.
    """
    started = time.perf_counter()
    decayed = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv1d)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": 0.01},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=warm_up)
    recent: list[float] = []
    model.train()
    for step in range(1, steps + 1):
        loss = loss_of(next(batches))
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        recent.append(loss.item())
        if step % 50 == 0 or step == steps:
            seconds = time.perf_counter() - started
            print(f"{name} step {step}/{steps} loss {np.mean(recent):.4f} {seconds:.0f} s", flush=True)
            recent.clear()
        if step % check_every == 0 and step < steps:
            model.eval()
            print(f"{name} step {step}/{steps} {check(step)}", flush=True)
            model.train()
    model.eval()
    return (time.perf_counter() - started) / 60
