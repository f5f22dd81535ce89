"""How a run of either stage begins or goes on: what it must go on with unchanged, and what it says at its start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sm_train import config
from sm_train.data.loader import Loader
from sm_train.data.mixing import FROZEN_ENCODER
from sm_train.data.shards import require_same
from sm_train.data.target_set import TargetTable
from sm_train.errors import Stopped, UserError
from sm_train.runlog import RunLog, last_line, say, write_environment
from sm_train.train import attempts, checkpoint
from sm_train.train.engines import Engine, EngineConfig, make_engine
from sm_train.train.engines.base import require_one_start
from sm_train.train.loop import Run, train
from sm_train.train.objectives import Objective

PRETRAIN, TUNE = "pretrain", "tune"
FROZEN_LLM = ("llm", "llm_revision", "tokenizer_hash", "pad_id", "embedding_hash")


def settings(cfg: Any, *sections: str) -> dict[str, Any]:
    """The values of some sections of a config, by dotted name."""
    values = {section: config.to_mapping(getattr(cfg, section)) for section in sections}
    return {f"{section}.{name}": value for section, fields in values.items() for name, value in fields.items()}


def optimizer(cfg: EngineConfig) -> dict[str, Any]:
    """What of an engine's config changes what is learnt; ranks, placement and precision may change on resume."""
    return {f"engine.{name}": getattr(cfg, name) for name in ("beta1", "beta2", "eps", "weight_decay", "clip")}


def own_loss(objective: Any) -> dict[str, Any]:
    """What names a loss that is not the stage's own: its class, its weights, and ``settings`` if it has them."""
    kind = type(objective)
    name = f"{kind.__module__}.{kind.__qualname__}"
    return {"objective": name, "weights": objective.weights, "settings": getattr(objective, "settings", {})}


def frozen(dataset: Mapping[str, Any], targets: TargetTable) -> dict[str, Any]:
    """The frozen models and data that a shard set and its target set come from."""
    of_encoder = {name: dataset[name] for name in FROZEN_ENCODER}
    of_llm = {name: targets.contract[name] for name in FROZEN_LLM}
    of_targets = {"normaliser": targets.contract["normaliser"], "targets": targets.contract["part_hashes"]}
    return {**of_encoder, **of_llm, **of_targets, "shards": dataset["part_hashes"]}


def read(run: Path, stage: str) -> checkpoint.Checkpoint | None:
    """The newest checkpoint of a run, if there is one.

    Raises:
        UserError: it is another stage's.
    """
    found = checkpoint.latest(run)
    resumed = checkpoint.load(found) if found else None
    if resumed and resumed.contract.get("stage", PRETRAIN) != stage:
        raise UserError(f"run {run} is not a run of {stage}; give another run folder")
    return resumed


def is_complete(run: Path, resumed: checkpoint.Checkpoint | None, contract: Mapping[str, Any], steps: int) -> bool:
    """Whether nothing is left to train.

    Raises:
        UserError: the run was begun with another contract.
    """
    if resumed is None:
        return False
    require_same(contract, resumed.contract, str(run), "give another run folder, or the value the run was begun with")
    if resumed.global_step < steps:
        return False
    say(f"{run}: complete, {resumed.global_step} steps")
    return True


def make_agreed_engine(
    cfg: EngineConfig, lanes: int, run: Path, resumed: checkpoint.Checkpoint | None, contract: Mapping[str, Any]
) -> Engine:
    """The engine, once every rank has found the same checkpoint, data and models."""
    engine = make_engine(cfg, lanes)
    require_one_start(engine, run, resumed.global_step if resumed else 0, contract)
    return engine


def begin(
    cfg: Any, engine: Engine, contract: dict[str, Any], description: dict[str, Any],
    resumed: checkpoint.Checkpoint | None, holds: str,
) -> Run:  # fmt: skip
    """Start or continue the run that ``cfg`` names: its config and environment are written, an attempt is counted.

    Args:
        cfg: a stage's config, with ``run``, ``seed`` and ``loop``.
        description: what a checkpoint's ``config.json`` holds.
        holds: what is trained, on what and how, for the terminal.
    """
    folder = Path(cfg.run)
    state = Run(folder, 0, cfg.seed, contract, description)
    if resumed:
        state.global_step, state.position, state.best_valid = resumed.global_step, resumed.position, resumed.best_valid
    if engine.rank == 0:
        _say_what_changes(cfg, folder, state)
        config.dump(cfg, folder / "config.yaml")
        write_environment(folder, engine.world_size)
        state.attempt = attempts.begin(folder, state.global_step, engine.world_size, last_line(folder))
        checkpoint.require_unmoved(folder, state.global_step)
        engine.watch.on_leave = lambda why: attempts.end(folder, state.attempt, state.global_step, why)
    say(
        f"{folder}: {holds}, {engine.world_size} rank{'s' * (engine.world_size > 1)} on {engine.device.type}, "
        f"from step {state.global_step} of {cfg.loop.steps}"
    )
    return state


def _say_what_changes(cfg: Any, folder: Path, state: Run) -> None:
    """What a person should know who goes on with a run."""
    if (number := attempts.current(folder)) and "ended" not in (last := attempts.read(folder, number)):
        who = f"pid {last.get('pid')} on {last.get('host')}"
        say(f"attempt {number} ({who}) did not say how it ended; if it is still at work, it will stop without writing")
    if state.global_step and (folder / "config.yaml").exists():
        steps = config.read_yaml(folder / "config.yaml").get("loop", {}).get("steps")
        if steps != cfg.loop.steps:
            say(f"warning: loop.steps was {steps} and is {cfg.loop.steps}: the learning rate follows the new length")


def follow_through(
    cfg: Any, engine: Engine, objective: Objective, loader: Loader, state: Run,
    validate: Callable[[], dict[str, float]] | None,
) -> Engine:  # fmt: skip
    """Train to the end, with the run's log and the record of how this attempt ended.

    Raises:
        Stopped: a signal asked for it; the state is saved.
        UserError: training cannot go on.
    """
    log = RunLog(state.folder, state.attempt, state.global_step) if engine.rank == 0 else None
    how = "error"
    try:
        signal_name = train(cfg.loop, cfg.schedule, engine, objective, loader, state, log, validate)
        how = signal_name or "complete"
    except UserError as error:
        how = f"error: {error}"
        raise
    except KeyboardInterrupt:
        how = "interrupted"
        raise
    finally:
        if log is not None:
            with suppress(OSError):  # of a disk that is full; training has said so
                log.close()
            with suppress(OSError):
                attempts.end(state.folder, state.attempt, state.global_step, how)
    if signal_name:
        engine.close()
        raise Stopped(f"{state.folder}: saved at step {state.global_step} on {signal_name}; the same command goes on")
    return engine
