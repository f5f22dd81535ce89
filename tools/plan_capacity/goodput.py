"""Goodput under faults: a simulation beside the closed formulas.

    python -m tools.plan_capacity.goodput [key=value ...]     # --help lists the keys

A fault takes the whole job down. It is noticed after ``detect_s``, the job is back after ``restart_s`` more (and, if
its node has to be replaced, ``replace_s``), and trains again what it had not saved. Faults may strike at any moment, in
a restart too.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sm_train import config
from sm_train.errors import UserError, run_command
from tools.plan_capacity import formulas

DAY_S = 86_400
LLAMA_3_FAULTS = 4.7e-4
"""Faults of a GPU in a day: 419 unexpected interruptions in 54 days on 16,384 GPUs (Llama 3, arXiv 2407.21783)."""
_MOST_FAULTS = 4_000_000
_LONGEST = 500.0
"""An interval by the time between faults: exp of it is a number still."""


@dataclass(frozen=True)
class GoodputConfig:
    """A job and its faults."""

    gpus: list[int] = config.key([4, 8, 64, 512, 1024, 4096], "numbers of GPUs")
    gpus_per_node: int = config.key(8, "GPUs that share a node, and its fate")
    faults_per_gpu_day: float = config.key(LLAMA_3_FAULTS, "of one GPU with its share of a node; Llama 3's")
    mtbf_s: float = config.key(
        0.0, "mean seconds between the job's faults, whatever its GPUs; 0: by faults_per_gpu_day"
    )
    detect_s: float = config.key(10.0, "until a fault is noticed")
    restart_s: float = config.key(60.0, "from there until training goes on")
    replace_share: float = config.key(0.0, "of the faults, those after which the node must be replaced")
    replace_s: float = config.key(0.0, "what that takes more")
    interval_s: float = config.key(0.0, "training between two checkpoints; 0 for the best, sqrt(2 d M)")
    stall_s: float = config.key(0.4, "that a checkpoint stops training: measured for the paper's mapper, resume bench")
    days: float = config.key(54.0, "length of the job")
    runs: int = config.key(200, "simulated jobs")
    seed: int = config.key(0, "of the faults")

    def __post_init__(self) -> None:
        if not self.gpus or min(self.gpus) < 1:
            raise ValueError(f"gpus is {list(self.gpus)}; it must name numbers above zero")
        for name in ("gpus_per_node", "faults_per_gpu_day", "stall_s", "days", "runs"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above zero")
        for name in ("mtbf_s", "detect_s", "restart_s", "replace_s", "interval_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if not 0 <= self.replace_share <= 1:
            raise ValueError(f"replace_share is {self.replace_share}; it must lie between 0 and 1")

    def mean_s(self, gpus: int) -> float:
        """M: a node fails as often as all its GPUs together, and a job as often as all its nodes."""
        nodes = math.ceil(gpus / self.gpus_per_node)
        per_node = self.faults_per_gpu_day * min(self.gpus_per_node, gpus) / DAY_S
        mean_s = self.mtbf_s or 1 / (nodes * per_node)
        if mean_s < 1:
            raise UserError(f"a fault comes every {mean_s:g} s on {gpus:,} GPUs; it must be every second or less often")
        return mean_s

    @property
    def outage_s(self) -> float:
        """R: detection and restart, on average."""
        return self.detect_s + self.restart_s + self.replace_share * self.replace_s

    def survived(self, mean_s: float) -> float:
        """E[exp(-R / M)]: the probability that no fault strikes before the job is back."""
        short = math.exp(-(self.detect_s + self.restart_s) / mean_s)
        return short * (1 - self.replace_share + self.replace_share * math.exp(-self.replace_s / mean_s))


@dataclass(frozen=True)
class Simulated:
    """Shares of the wall time, over all simulated jobs; they add up to 1."""

    goodput: float
    detect: float
    restart: float
    replay: float
    checkpoint: float
    low: float
    """Goodput that 5% of the jobs stay below."""
    high: float
    """Goodput that 5% exceed."""
    faults: float
    """Of one job."""


def simulate(cfg: GoodputConfig, mean_s: float, interval_s: float) -> Simulated:
    """Simulate jobs fault by fault; exact for exponential times between faults, as nothing is approximated."""
    whole_s = cfg.days * DAY_S
    if whole_s / mean_s > _MOST_FAULTS / 2:
        raise UserError(f"days is {cfg.days:g}, with a fault every {mean_s:g} s: too many to simulate; take fewer days")
    most = math.ceil(whole_s / mean_s + 8 * math.sqrt(whole_s / mean_s) + 8)
    runs = max(min(cfg.runs, _MOST_FAULTS // most), 1)
    rng = np.random.default_rng(cfg.seed)
    ends = np.minimum(np.cumsum(rng.exponential(mean_s, (runs, most)), axis=1), whole_s)
    gaps = np.diff(ends, axis=1, prepend=0.0)  # from one fault to the next, of one job a row
    is_cut = ends >= whole_s  # by the job's end, not by a fault
    back_s = cfg.restart_s + cfg.replace_s * (rng.random(gaps.shape) < cfg.replace_share)
    detect = np.minimum(gaps, cfg.detect_s)
    restart = np.minimum(gaps - detect, back_s)
    detect[:, 0] = restart[:, 0] = 0.0  # a job does not begin with a fault
    useful, replay, checkpoint = _train(gaps - detect - restart, is_cut, interval_s, cfg.stall_s)
    shares = {name: float(part.sum() / (runs * whole_s)) for name, part in
              (("detect", detect), ("restart", restart), ("replay", replay), ("checkpoint", checkpoint))}  # fmt: skip
    by_run = useful.sum(axis=1) / whole_s
    low, high = np.quantile(by_run, [0.05, 0.95])
    faults = float((~is_cut).sum()) / runs
    return Simulated(float(by_run.mean()), **shares, low=float(low), high=float(high), faults=faults)


def _train(
    seconds: NDArray[np.float64], is_cut: NDArray[np.bool_], interval_s: float, stall_s: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """What becomes of stretches of uninterrupted seconds: kept, trained for nothing, spent on checkpoints."""
    cycles = np.floor(seconds / (interval_s + stall_s))
    rest = seconds - cycles * (interval_s + stall_s)
    unsaved = np.minimum(rest, interval_s)
    checkpoint = cycles * stall_s + rest - unsaved
    return cycles * interval_s + np.where(is_cut, unsaved, 0.0), np.where(is_cut, 0.0, unsaved), checkpoint


def row(cfg: GoodputConfig, gpus: int) -> list[str]:
    """One line of the table."""
    mean_s = cfg.mean_s(gpus)
    interval_s = cfg.interval_s or formulas.best_interval_s(cfg.stall_s, mean_s)
    if (interval_s + cfg.stall_s) / mean_s > _LONGEST:
        raise UserError(
            f"interval_s is {interval_s:g} with a stall of {cfg.stall_s:g} s and a fault every {mean_s:g} s: nothing "
            "would ever be saved; take a shorter one, or interval_s=0 for the best"
        )
    found = simulate(cfg, mean_s, interval_s)
    first_order = formulas.goodput(interval_s, cfg.stall_s, cfg.outage_s, mean_s)
    exact = formulas.goodput_exact(interval_s, cfg.stall_s, cfg.survived(mean_s), mean_s)
    losses = (found.detect, found.restart, found.replay, found.checkpoint)
    return [
        f"{gpus:,}", f"{mean_s:,.0f}", f"{interval_s:,.0f}", f"{found.faults:,.1f}", f"{found.goodput:.3%}",
        f"{found.low:.3%} to {found.high:.3%}", *(f"{loss:.3%}" for loss in losses), f"{first_order:.3%}",
        f"{exact:.3%}",
    ]  # fmt: skip


def table(cfg: GoodputConfig) -> str:
    """Every number of GPUs, as Markdown."""
    heads = ["GPUs", "M, s", "I, s", "faults a job", "goodput, simulated", "5% to 95% of the jobs", "detect", "restart",
             "replay", "checkpoint", "1 - d/I - I/2M - R/M", "exact"]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row(cfg, gpus))} |" for gpus in cfg.gpus)])


def main(argv: list[str]) -> None:
    if any(word in ("-h", "--help") for word in argv):
        print(
            f"usage: python -m tools.plan_capacity.goodput [key=value ...]\n\nkeys:\n{config.describe(GoodputConfig)}"
        )
        return
    words = [f"gpus=[{word[5:]}]" if re.fullmatch(r"gpus=[^\[].*", word) else word for word in argv]
    cfg = config.from_words(GoodputConfig, words, "tools.plan_capacity.goodput")
    print(f"d {cfg.stall_s:g} s, R {cfg.outage_s:g} s, {cfg.days:g} days, seed {cfg.seed}\n\n{table(cfg)}")


if __name__ == "__main__":
    run_command(main)
