"""Checkpoints: one format for every engine, whole or absent.

checkpoints/step-N/   mapper.safetensors  config.json  moments.safetensors  state.json (with the hashes of the others)
                      adapter_model.safetensors  adapter_config.json, where an adapter of the LLM is trained too
checkpoints/latest -> step-N              checkpoints/best -> step-M
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sm_train import files
from sm_train.data import arrival
from sm_train.data.mds import file_digest
from sm_train.data.plan import Position
from sm_train.errors import UserError
from sm_train.models import adapter
from sm_train.runlog import METRICS
from sm_train.train import attempts
from sm_train.train.engines.base import TrainState

WEIGHTS = "mapper.safetensors"
MOMENTS = "moments.safetensors"
STATE = "state.json"


@dataclass
class Checkpoint:
    """Where a run stands: the engine's state, the position in the plan, and what it must go on with unchanged."""

    state: TrainState
    global_step: int
    position: Position
    """The next step to take."""
    contract: dict[str, Any]
    """Plan, settings, frozen models: compared on resume."""
    best_valid: float | None
    """The lowest validation figure so far, of the kind the run is judged by."""


def save(
    run: Path, attempt: int, checkpoint: Checkpoint, description: Mapping[str, Any], *, is_best: bool, keep: int
) -> None:
    """Write a checkpoint aside, publish it by a rename, then point ``latest`` (and ``best``) at it.

    Raises:
        UserError: a newer attempt owns the run.
        OSError: the disk is full or fails; what was there before is as it was.
    """
    folder = run / "checkpoints"
    name = f"step-{checkpoint.global_step}"
    before = latest(run)
    if before == folder / name and (folder / "latest").is_symlink():
        return
    attempts.require_current(run, attempt)
    aside = folder / f".aside-{name}-{attempt}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        _write(aside, checkpoint, description)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)  # a full disk is given its room back
        raise
    if (log := run / METRICS).exists():
        files.sync(log)  # a checkpoint never outlives the lines of its steps
    files.sync(run)
    attempts.require_current(run, attempt)
    has_links = any((folder / link).is_symlink() for link in ("latest", "best"))
    if before and not has_links and files.read_json(before / STATE)["best_valid"] is not None:
        _point(folder / "best", before.name)  # of a run killed inside its first save: its figure was the best
    if (folder / name).exists():  # what an attempt left that went further than the checkpoint this one began from
        os.rename(folder / name, folder / f".aside-old-{name}-{attempt}")
    files.publish_folder(aside, folder / name, marker=STATE)
    attempts.require_current(run, attempt)
    if is_best:  # before latest: a run killed in between is at the step before, and finds its best again
        _point(folder / "best", name)
    _point(folder / "latest", name)
    _remove_old(folder, keep)


def _write(aside: Path, checkpoint: Checkpoint, description: Mapping[str, Any]) -> None:
    state = checkpoint.state
    moments = {"exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
    flat = {f"{kind}.{name}": tensor for kind, tensors in moments.items() for name, tensor in tensors.items()}
    of_mapper, of_adapter = adapter.split(state.weights)
    tensors = {WEIGHTS: of_mapper, MOMENTS: flat, **({adapter.WEIGHTS: of_adapter} if of_adapter else {})}
    try:
        for name, of_file in tensors.items():
            save_file(of_file, aside / name)
    except SafetensorError as error:
        raise OSError(str(error)) from None
    for name in tensors:  # safetensors lets nobody else read what it writes
        os.chmod(aside / name, aside.stat().st_mode & 0o666)
    files.write_json(aside / "config.json", dict(description))
    if of_adapter:
        files.write_json(aside / adapter.CONFIG, description["adapter"])
    files.write_json(
        aside / STATE,
        {
            "schema": 1,
            "global_step": checkpoint.global_step,
            "epoch": checkpoint.position.epoch,
            "step_in_epoch": checkpoint.position.step,
            "adam_step": state.adam_step,
            "scaler": state.scaler,
            "best_valid": checkpoint.best_valid,
            "contract": checkpoint.contract,
            "files": {name: file_digest(aside / name) for name in tensors},
        },
    )


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint folder.

    Raises:
        UserError: it is not a whole checkpoint.
    """
    arrival.wait_for(folder / STATE)
    try:
        saved = files.read_json(folder / STATE)
        for name, digest in saved.get("files", {}).items():
            arrival.wait_for(folder / name)
            if file_digest(folder / name) != digest:
                raise OSError(f"the bytes of {name} are not those that were written")
        weights, moments = load_file(folder / WEIGHTS), load_file(folder / MOMENTS)
        weights |= adapter.read(folder)
    except (OSError, SafetensorError, UserError) as error:
        others = [step.name for step in _steps(folder.parent) if step.name != folder.resolve().name]
        remedy = (
            f"go on from another: ln -sfn {others[-1]} {folder.parent / 'latest'}" if others else "there is no other"
        )
        raise UserError(f"checkpoint {folder} is damaged ({error}); {remedy}") from None
    kinds = {
        kind: {name.removeprefix(f"{kind}."): t for name, t in moments.items() if name.startswith(f"{kind}.")}
        for kind in ("exp_avg", "exp_avg_sq")
    }
    state = TrainState(
        weights,
        kinds["exp_avg"],
        kinds["exp_avg_sq"],
        saved["adam_step"],
        saved["scaler"],
    )
    position = Position(saved["epoch"], saved["step_in_epoch"])
    return Checkpoint(state, saved["global_step"], position, saved["contract"], saved["best_valid"])


def latest(run: Path) -> Path | None:
    """The newest checkpoint of a run, if there is one: that ``latest`` points at; without the link, the last step's."""
    return _pointed(run / "checkpoints" / "latest") or next(reversed(_steps(run / "checkpoints")), None)


def best(run: Path) -> Path | None:
    """The checkpoint with the best validation, or the newest where none was validated.

    The newest, too, where a save was killed that was to replace the best one; the run's next attempt makes it again.
    """
    found = _pointed(run / "checkpoints" / "best")
    return found if found is not None and arrival.wait_for(found / STATE) else latest(run)


def require_unmoved(run: Path, global_step: int) -> None:
    """Raises UserError if the newest checkpoint is another than the one that was read before this attempt counted."""
    found = latest(run)
    name = found.name if found else "step-0"
    if name != f"step-{global_step}":
        raise UserError(
            f"run {run}: an older attempt saved {name} while this one was starting from step {global_step}; "
            "run the same command again"
        )


def find(path: Path, name: str = "best") -> Path:
    """The checkpoint folder that ``best`` or ``latest`` of a run folder names; a checkpoint folder is taken as it is.

    Raises:
        UserError: there is none.
    """
    is_link = path.is_symlink() and os.path.basename(os.readlink(path)).startswith("step-")  # latest or best itself
    if (is_link and arrival.wait_for(path / WEIGHTS)) or (path / WEIGHTS).exists():
        return path
    if not path.exists():
        raise UserError(f"run {path} does not exist")
    found = {"best": best, "latest": latest}.get(name, lambda _run: Path(name))(path)
    if name in ("best", "latest") and found is not None:
        arrival.wait_for(found / WEIGHTS)
    if found is None or not (found / WEIGHTS).exists():
        raise UserError(f"run {path} has no checkpoint {name!r}; train it first, or name a checkpoint folder")
    return found


def _pointed(link: Path) -> Path | None:
    if link.exists() and not link.is_symlink():
        raise UserError(f"{link} is no link but a copy; make it one again: ln -s step-N {link}")
    return link.parent / os.readlink(link) if link.is_symlink() else None


def _point(link: Path, name: str) -> None:
    aside = link.with_name(f".aside-{link.name}-{os.getpid()}")
    aside.unlink(missing_ok=True)
    os.symlink(name, aside)
    os.replace(aside, link)
    files.sync(link.parent)


def _steps(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted((path for path in found if (path / STATE).exists()), key=lambda path: int(path.name[5:]))


def _remove_old(folder: Path, keep: int) -> None:
    pointed = {path for link in ("latest", "best") if (path := _pointed(folder / link))}
    last = int(os.readlink(folder / "latest").removeprefix("step-"))
    # Those beyond latest were left by attempts that went further, before somebody pointed it back.
    steps = _steps(folder)
    beyond = [path for path in steps if int(path.name[5:]) > last]
    older = [path for path in steps if path not in beyond][:-keep]
    for path in {*older, *beyond} - pointed:
        os.rename(path, folder / f".aside-old-{path.name}")  # whole or absent, here too
    files.sync(folder)
    for path in folder.glob(".aside-*"):  # what killed attempts left
        if path.is_symlink():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=True)
