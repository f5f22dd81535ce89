"""A plan as text, and as plain values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from tools.plan_capacity.plan import Plan, Stored
from tools.plan_capacity.settings import PlanConfig
from tools.plan_capacity.stages import StagePlan

_UNITS = (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def size(num_bytes: float) -> str:
    """Bytes for people, three digits."""
    for unit, factor in _UNITS:
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def duration(seconds: float) -> str:
    """Seconds for people."""
    for unit, factor in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * factor:
            return f"{seconds / factor:,.1f} {unit}"
    return f"{seconds:.1f} s"


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _money(cfg: PlanConfig, gpu_hours: float) -> list[str]:
    return [f"{gpu_hours * cfg.price_per_gpu_hour:,.0f}"] if cfg.price_per_gpu_hour else []


def _row(cfg: PlanConfig, stage: StagePlan) -> list[str]:
    gpus = "-" if stage.name == "retarget" else str(stage.gpus)
    feed = f"{stage.feed / 1e6:,.0f} MB/s" if stage.feed else "-"
    numbers = [duration(stage.seconds), f"{stage.gpu_hours:,.1f}", *_money(cfg, stage.gpu_hours)]
    return [stage.name, gpus, *numbers, size(stage.disk_bytes), size(stage.read), feed, stage.limit]


def text(cfg: PlanConfig, plan: Plan) -> str:
    """One plan in full."""
    cost = ["cost"] if cfg.price_per_gpu_hour else []
    heads = ["stage", "GPUs", "time", "GPU-hours", *cost, "stays on disk", "read", "feed a GPU", "limited by"]
    rows = [_row(cfg, stage) for stage in plan.stages]
    total = sum(stage.disk_bytes for stage in plan.stages), sum(stage.read for stage in plan.stages)
    rows.append(["all", "", duration(plan.wall_s), f"{plan.gpu_hours:,.1f}", *_money(cfg, plan.gpu_hours),
                 *map(size, total), "", ""])  # fmt: skip
    corpus = plan.corpus
    lines = [
        f"{plan.hours:,.1f} h of training audio, {corpus.num_all:,.0f} utterances of {corpus.mean_s:.1f} s "
        f"({corpus.source}); {cfg.gpus} x {cfg.gpu}",
        "", table(heads, rows), "", *_parts(plan), "", *(_against(cfg, plan.stored) if plan.stored else []),
        f"faults: one in {plan.mtbf_h:,.0f} h on {cfg.gpus} GPUs; goodput of training {plan.goodput:.2%}, not in the "
        "times above (tools.plan_capacity.goodput)",
        "", "Rates, and where they are from:", "",
        table(["rate", "value", "", "kind", "source"],
               [[name, f"{rate.value:.4g}", rate.unit, rate.kind, rate.source] for name, rate in plan.rates.rows()]),
    ]  # fmt: skip
    return "\n".join(lines)


def _parts(plan: Plan) -> list[str]:
    lines = []
    for stage in plan.stages:
        how = " beside " if stage.name == "precompute" else " + "
        lines.append(f"{stage.name}: {how.join(f'{name} {duration(s)}' for name, s in stage.parts.items())}")
        lines.append(f"  bytes: {', '.join(f'{kind} {size(n)}' for kind, n in stage.disk.items())}")
        lines += [f"  {note}" for note in stage.notes]
    return lines


def _against(cfg: PlanConfig, stored: Stored) -> list[str]:
    per_epoch = stored.again_gpu_hours / stored.epochs if stored.epochs else 0.0
    reads = f"reading {size(stored.feature_read)}", f"reading {size(stored.audio_read)}"
    lines = [
        f"features stored: {size(stored.feature_bytes)}, {stored.stored_gpu_hours:,.1f} GPU-hours once, {reads[0]} in "
        f"{stored.epochs:,.2f} epochs",
        f"encoded in every epoch: nothing stored, {stored.again_gpu_hours:,.1f} GPU-hours ({per_epoch:,.1f} an epoch), "
        f"{reads[1]}; a step takes {stored.slower:.1f} times as long",
    ]
    price = f", {cfg.months:g} months of storage cost {stored.storage_cost:,.2f}" if cfg.price_per_gpu_hour else ""
    return [*lines, f"storing pays from {stored.break_even_epochs:.2f} epochs on{price}", ""]


def sizes(cfg: PlanConfig, plans: list[Plan]) -> str:
    """Several corpus sizes, a line each."""
    names = [stage.name for stage in plans[0].stages]
    cost = ["cost"] if cfg.price_per_gpu_hour else []
    heads = ["hours", *names, "GPU-hours", *cost, "stays on disk", "feed a GPU of pretrain"]
    rows = []
    for plan in plans:
        stages = {stage.name: stage for stage in plan.stages}
        cells = [f"{duration(stages[name].seconds)}, {stages[name].limit}" for name in names]
        disk = size(sum(stage.disk_bytes for stage in plan.stages))
        feed = f"{stages['pretrain'].feed / 1e6:,.0f} MB/s" if "pretrain" in stages else "-"
        money = _money(cfg, plan.gpu_hours)
        rows.append([f"{plan.hours:,.1f}", *cells, f"{plan.gpu_hours:,.0f}", *money, disk, feed])
    return table(heads, rows)


def values(cfg: PlanConfig, plans: list[Plan]) -> dict[str, Any]:
    """Everything, ready for JSON: seconds, bytes, bytes a second."""
    return {
        "schema": 1,
        "gpu": cfg.gpu,
        "gpus": cfg.gpus,
        "plans": [
            {
                "hours": plan.hours,
                "utterances": plan.corpus.num_all,
                "seconds": plan.wall_s,
                "gpu_hours": plan.gpu_hours,
                "cost": plan.gpu_hours * cfg.price_per_gpu_hour,
                "goodput": plan.goodput,
                "mtbf_hours": plan.mtbf_h,
                "stages": [{**asdict(stage), "gpu_hours": stage.gpu_hours, "disk_bytes": stage.disk_bytes}
                           for stage in plan.stages],
                "stored": asdict(plan.stored) if plan.stored else None,
                "rates": {name: asdict(rate) for name, rate in plan.rates.rows()},
            }
            for plan in plans
        ],
    }  # fmt: skip
