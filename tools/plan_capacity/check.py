"""A plan beside a real job: every stage is predicted, then run by its own command; time and bytes, and their ratios.

    python -m tools.plan_capacity.check CONFIG rates=rates.json [utterances=1500] [key=value ...]

The corpus is a part of the plan's, trained on for a few steps. Nobody knows how long so raw a mapper's answers are:
give ``unfinished=1`` if they go on to max_new_tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sm_train import config, files
from sm_train.errors import UserError, run_command
from tools.plan_capacity import jobs, plan, render
from tools.plan_capacity.jobs import Place, Sizes
from tools.plan_capacity.settings import STAGES, PlanConfig


@dataclass(frozen=True)
class CheckConfig(PlanConfig):
    """A plan, and the size of the job that it is compared with."""

    utterances: int = config.key(1500, "training utterances to encode")
    held_out: int = config.key(60, "utterances of each split to validate and to evaluate on")
    steps: int = config.key(100, "steps of pretraining; it validates and saves twice")
    tune_steps: int = config.key(24, "steps of tuning; it validates and saves twice")
    folder: str | None = config.key(None, "folder to work in, kept; null: one that is removed")


@dataclass(frozen=True)
class Compared:
    """One stage: seconds and bytes, predicted and measured."""

    stage: str
    predicted_s: float
    measured_s: float
    predicted_bytes: float
    measured_bytes: float

    @property
    def time_ratio(self) -> float:
        return self.measured_s / self.predicted_s

    @property
    def bytes_ratio(self) -> float:
        return self.measured_bytes / self.predicted_bytes


def place_of(cfg: CheckConfig, folder: Path) -> Place:
    """The job, ready to be run."""
    place = jobs.carve(cfg, folder, Sizes(cfg.utterances, cfg.held_out, cfg.held_out))
    loops = {}
    for stage, steps in (("pretrain", cfg.steps), ("tune", cfg.tune_steps)):
        every = max(steps // 2, 1)
        settings = {"steps": steps, "save_every": every, "validate_every": every, "log_every": 1000}
        loops[stage] = [f"loop.{name}={value}" for name, value in settings.items()]
    return jobs.with_words(place, loops)


def left_by(place: Place, stage: str) -> int:
    """Bytes that a stage has left on disk."""
    if stage == "evaluate":
        folder = place.shapes.evaluate.folder
        return sum((folder / name).stat().st_size for name in ("hypotheses.jsonl", "results.json", "report.html"))
    if stage == "retarget":
        return jobs.bytes_of(place.targets)
    if stage == "precompute":
        return jobs.bytes_of(place.shards)
    return jobs.bytes_of(Path(getattr(place.shapes, stage).run))


def compare(place: Place) -> list[Compared]:
    """Predict every stage, then run it."""
    cfg = place.cfg
    (planned,) = plan.make(cfg)
    found = []
    for stage in planned.stages:
        measured_s = jobs.timed(place, stage.name)
        found.append(Compared(stage.name, stage.seconds, measured_s, stage.disk_bytes, left_by(place, stage.name)))
        print(f"{stage.name}: {measured_s:.1f} s, load {jobs.load():.1f}", flush=True)
    return found


def table(found: Sequence[Compared]) -> str:
    """The comparison as Markdown."""
    heads = ["stage", "predicted", "measured", "measured / predicted", "predicted bytes", "measured bytes",
             "measured / predicted"]  # fmt: skip
    total = Compared("all", *(sum(getattr(one, name) for one in found) for name in
                              ("predicted_s", "measured_s", "predicted_bytes", "measured_bytes")))  # fmt: skip
    rows = [
        [one.stage, f"{one.predicted_s:.1f} s", f"{one.measured_s:.1f} s", f"{one.time_ratio:.2f}",
         render.size(one.predicted_bytes), render.size(one.measured_bytes), f"{one.bytes_ratio:.3f}"]
        for one in [*found, total]
    ]  # fmt: skip
    return render.table(heads, rows)


def main(argv: list[str]) -> None:
    cfg = config.load(CheckConfig, argv, "tools.plan_capacity.check")
    if list(cfg.stages) != list(STAGES):
        raise UserError("stages: a check runs them all, as each needs what the one before has made")
    before = jobs.load()
    with tempfile.TemporaryDirectory(prefix="check-") as scratch:
        place = place_of(cfg, Path(cfg.folder or scratch).resolve())
        found = compare(place)
    print(f"\nload {before:.1f} before, {jobs.load():.1f} after\n\n{table(found)}")
    if cfg.out:
        files.write_json(Path(cfg.out), [config.to_mapping(one) for one in found])


if __name__ == "__main__":
    run_command(main)
