"""Stage 1: pretrain the mapper on precomputed features and targets, with no LLM in the loop.

    python -m sm_train.pretrain CONFIG.yaml [key=value ...]
    torchrun --nproc-per-node 2 -m sm_train.pretrain CONFIG.yaml [key=value ...]

The same command continues an interrupted run exactly, on any number of ranks that divides batch.lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sm_train import config
from sm_train.data.loader import Loader, LoaderConfig, plan_items
from sm_train.data.mixing import MixedItems, Sources, Utterances, check_weights
from sm_train.data.plan import WINDOW_ITEMS, Planner
from sm_train.data.target_set import TargetTable
from sm_train.errors import exit_hard, run_command
from sm_train.models.mapper import MapperConfig, SpeechMapper
from sm_train.runlog import say
from sm_train.scoring.decode import TRIMS
from sm_train.train import start
from sm_train.train.engines import Engine, EngineConfig
from sm_train.train.engines.base import place
from sm_train.train.loop import LoopConfig
from sm_train.train.objectives.padded import PaddedConfig, PaddedObjective, PaddedRegression
from sm_train.train.schedule import ScheduleConfig


@dataclass(frozen=True)
class BatchConfig:
    """The size of a step."""

    frames: int = config.key(10_000, "budget of a micro-batch: items times the longest one's frames")
    lanes: int = config.key(4, "G: micro-batches of a step over all ranks; the number of ranks must divide it")

    window: int = config.key(
        WINDOW_ITEMS, "items that are sorted by length together: fewer mix lengths more and pad more"
    )
    epoch_steps: int = config.key(
        0, "steps of an epoch, about, when several sets are mixed; 0: until the scarcest set is through once"
    )

    def __post_init__(self) -> None:
        for name in ("frames", "lanes", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"batch.{name} is {getattr(self, name)}; it must be at least 1")
        if self.epoch_steps < 0:
            raise ValueError(f"batch.epoch_steps is {self.epoch_steps}; it must be 0 or more")


@dataclass(frozen=True)
class PretrainConfig:
    """Stage 1."""

    run: str = config.key(config.REQUIRED, "run folder")
    shards: Any = config.key(
        config.REQUIRED, "shard set that precompute wrote, or {folder: share of the padded frames} of several"
    )
    target: str = config.key(config.REQUIRED, "name of a target set in it, or in each")
    splits: list[str] = config.key(["train"], "splits to train on")
    valid_splits: list[str] = config.key(["valid"], "splits to validate on; [] for none")
    trim: str = config.key("change_point", "where validation ends the text: change_point | first_pad | none")
    seed: int = config.key(0, "seed of weights, plan and dropout")
    mapper: MapperConfig = config.key(MapperConfig(), "the mapper")
    objective: PaddedConfig = config.key(PaddedConfig(), "the loss")
    batch: BatchConfig = config.key(BatchConfig(), "the size of a step")
    schedule: ScheduleConfig = config.key(ScheduleConfig(), "the learning rate")
    engine: EngineConfig = config.key(EngineConfig(), "precision, optimizer, distribution")
    loop: LoopConfig = config.key(LoopConfig(), "steps, checkpoints, validation")
    loader: LoaderConfig = config.key(LoaderConfig(), "reading ahead, remote shard sets")

    def __post_init__(self) -> None:
        check_weights(self.shards)
        if self.batch.epoch_steps and isinstance(self.shards, str):
            raise ValueError("batch.epoch_steps is for several sets mixed, and shards is one folder; leave it at 0")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must lie in [0, 2^63)")
        if self.trim not in TRIMS:
            raise ValueError(f"trim is {self.trim!r}; it must be one of {', '.join(TRIMS)}")


MakeObjective = Callable[[SpeechMapper, TargetTable, PretrainConfig], Any]
"""Gives the loss: a torch module that is a :class:`~sm_train.train.objectives.Objective`."""


def padded(mapper: SpeechMapper, targets: TargetTable, cfg: PretrainConfig) -> PaddedObjective:
    """The paper's loss."""
    mean_square, chosen = targets.contract["mean_square"], cfg.objective
    regression = PaddedRegression(targets.rows_RD, targets.pad_row, mean_square, chosen.mse, chosen.cosine)
    return PaddedObjective(mapper, regression, chosen)


def run(cfg: PretrainConfig, make_objective: MakeObjective = padded) -> Engine | None:
    """Train to the last step; a finished run returns at once."""
    import torch

    folder = Path(cfg.run)
    resumed = start.read(folder, start.PRETRAIN)
    sources = Sources(cfg.shards, cfg.target, cfg.loader.cache, cfg.loader.cache_limit_gb)
    targets, items, batch = sources.targets, sources.training(cfg.splits, cfg.seed), cfg.batch
    if isinstance(items, MixedItems):
        items.set_epoch_steps(batch.epoch_steps, batch.frames, batch.lanes, batch.window)
    torch.manual_seed(cfg.seed)
    output_rms = targets.rms if cfg.objective.mse == "relative" else 1.0
    mapper = SpeechMapper(cfg.mapper, items.feature_width, targets.rows_RD.shape[1], output_rms)
    objective = make_objective(mapper, targets, cfg)
    planner = plan_items(items, cfg.seed, batch.frames, batch.lanes, batch.window)
    loader = Loader(items, objective.counts, planner, *place(), cfg.loader.read_ahead)
    contract = {**_contract(cfg, planner, items), **({} if make_objective is padded else start.own_loss(objective))}
    if start.is_complete(folder, resumed, contract, cfg.loop.steps):
        return None
    hours = float(items.duration_s.sum()) / 3600
    holds = f"{mapper.num_parameters:,} parameters, {len(items)} utterances, {hours:.2f} h, {cfg.engine}"
    engine = start.make_agreed_engine(cfg.engine, cfg.batch.lanes, folder, resumed, contract)
    engine.prepare(objective, mapper, resumed.state if resumed else None)
    with engine.watch:
        state = start.begin(cfg, engine, contract, mapper.description(), resumed, holds)
        validate = _validation(cfg, engine, sources, mapper)
        return start.follow_through(cfg, engine, objective, loader, state, validate)


def _contract(cfg: PretrainConfig, planner: Planner, items: Utterances) -> dict[str, Any]:
    """What a run must go on with unchanged; ranks, engine and precision may change, and the number of steps."""
    chosen = start.settings(cfg, "batch", "mapper", "objective", "schedule")
    frozen = start.frozen(items.dataset, items.targets)
    # The fingerprint's name comes last, so that a difference is reported by the setting that makes it.
    plan = {
        "seed": cfg.seed,
        "splits": cfg.splits,
        "valid_splits": cfg.valid_splits,
        "loader.cache": "used" if planner.has_lane_windows else "not used",
        "utterance_plan": planner.fingerprint,
    }
    return {**chosen, **start.optimizer(cfg.engine), **frozen, **plan}


def _validation(cfg: PretrainConfig, engine: Engine, sources: Sources, mapper: SpeechMapper) -> Any:
    if not cfg.valid_splits or not cfg.loop.validate_every:
        return None
    from sm_train.train.validate import NearestTokenWer

    items = sources.validation(cfg.valid_splits)
    wer = NearestTokenWer(items, cfg.trim, cfg.batch.frames)
    say(f"validation: nearest of {wer.vocabulary} tokens, {len(items)} utterances of {', '.join(cfg.valid_splits)}")
    return partial(wer, engine, mapper)


def main(argv: list[str], make_objective: MakeObjective = padded) -> None:
    engine = run(config.load(PretrainConfig, argv, "sm_train.pretrain"), make_objective)
    if engine is not None:
        engine.close()
        exit_hard()


if __name__ == "__main__":
    run_command(main)
