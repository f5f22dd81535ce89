"""All that a run of training writes besides its model: attempts, log, checkpoints; stopped after every call and gone
on with."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from sm_train import files
from sm_train.data.plan import Position
from sm_train.runlog import RunLog
from sm_train.train import attempts, checkpoint
from sm_train.train.engines.base import TrainState
from tests.chaos import disk
from tests.chaos.disk import Disk, Tree
from tests.training import assert_equal

STEPS = 4
BEST = (1, 3)
DESCRIPTION = {"model_type": "speech_mapper"}


def made(step: int) -> checkpoint.Checkpoint:
    """The checkpoint of a step."""
    generator = torch.Generator().manual_seed(step)
    tensors = [{name: torch.randn(3, 2, generator=generator) for name in ("a.weight", "b.weight")} for _ in range(3)]
    return checkpoint.Checkpoint(TrainState(*tensors, adam_step=step), step, Position(0, step), {"seed": 3}, 0.5)


@dataclass
class State:
    """One folder that a stop may leave."""

    call: str
    kind: str
    """death | power"""
    tree: Tree
    saved: int
    """The last step whose save had returned."""
    begun: int
    """The last attempt that had begun."""


@dataclass
class Stops:
    """All different folders that stops of a run may leave."""

    thorough: bool
    saved: int
    begun: int
    states: list[State] = field(default_factory=list)
    calls: int = 0
    _seen: set[Any] = field(default_factory=set)
    disk: Disk | None = None

    def done(self, what: str, number: int) -> None:
        """Take note of what has returned."""
        self.saved = number if what == "saved" else self.saved
        self.begun = number if what == "begun" else self.begun
        assert self.disk is not None
        self.disk.look(what)

    def at_change(self, call: str) -> None:
        """Keep what a stop right after a call may leave."""
        assert self.disk is not None
        self.calls += 1
        found = [("death", self.disk.after_death()), ("power", self.disk.after_power_loss(self.thorough))]
        for kind, tree in itertools.chain.from_iterable(((k, tree) for tree in trees) for k, trees in found):
            key = (self.saved, self.begun, frozenset(tree.items()))
            if key not in self._seen:
                self._seen.add(key)
                self.states.append(State(call, kind, tree, self.saved, self.begun))


class _NoBoard:
    """TensorBoard's files are no part of what a run goes on from."""

    def __init__(self, *args: object, **settings: object) -> None: ...
    def add_scalar(self, *args: object) -> None: ...
    def close(self) -> None: ...


def follow_through(run: Path, done: Callable[[str, int], object] = lambda what, number: None) -> None:
    """A run from its latest checkpoint, if it has one, to its last step, with a save after each.

    Args:
        done: called when an attempt has begun, the log is open, a line is written, a step is saved.
    """
    found = checkpoint.latest(run)
    begun = checkpoint.load(found).global_step if found else 0
    attempt = attempts.begin(run, begun)
    done("begun", attempt)
    log = RunLog(run, attempt, begun)
    done("log", begun)
    for step in range(begun + 1, STEPS + 1):
        log.write(step, {"loss": 1 / step})
        done("line", step)
        checkpoint.save(run, attempt, made(step), DESCRIPTION, is_best=step in BEST, keep=1)
        done("saved", step)
    log.close()
    attempts.end(run, attempt, STEPS, "complete")


def new(run: Path) -> None:
    """An empty run folder."""
    run.mkdir()


def went_further(run: Path) -> None:
    """A run that has been through, whose latest was then pointed back at step 1: steps 2 and 3, the best, are made
    again."""
    kept = run.with_name("kept")
    for step in (1, 2):
        attempts.begin(kept)
        checkpoint.save(kept, step, made(step), DESCRIPTION, is_best=False, keep=2)
    follow_through(run)
    folder = run / "checkpoints"
    for step in (1, 2):
        shutil.copytree(kept / f"checkpoints/step-{step}", folder / f"step-{step}")
    shutil.rmtree(folder / f"step-{STEPS}")
    (folder / "latest").unlink()
    (folder / "latest").symlink_to("step-1")


def all_recovered(folder: Path, begin: Callable[[Path], object], patch: pytest.MonkeyPatch, thorough: bool) -> Stops:
    """Stop a run after every call it makes, in every way, and go on with it; AssertionError where that fails.

    Args:
        begin: makes the run folder that the run starts from.
        thorough: see :meth:`Disk.after_power_loss`.
    """
    patch.setattr("torch.utils.tensorboard.SummaryWriter", _NoBoard)
    run = folder / "run"
    begin(run)
    found = stops(run, patch, thorough)
    expected = ending(run)
    for number, state in enumerate(found.states):
        try:
            recover(state, folder / str(number), expected, patch)
        except Exception as error:
            error.add_note(f"stopped after {state.call!r} ({state.kind}) with {sorted(state.tree)}")
            raise
    return found


def stops(run: Path, patch: pytest.MonkeyPatch, thorough: bool) -> Stops:
    """Follow a run through from the folder as it is, and collect what stops would leave."""
    latest = checkpoint.latest(run)
    found = Stops(thorough, int(latest.name[5:]) if latest else 0, attempts.current(run))
    found.disk = Disk(run, found.at_change)
    with patch.context() as context:
        found.disk.follow(context)
        follow_through(run, found.done)
    return found


def ending(run: Path) -> dict[str, str | bytes]:
    """What must be the same at the end of a run, however often it was stopped."""
    folder = run / "checkpoints"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, str | bytes] = {"metrics": repr([(row["step"], row["loss"]) for row in rows])}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[path.name] = os.readlink(path)
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
        else:
            found[str(path.relative_to(folder))] = "folder"
    said = files.read_json(run / f"attempts/{attempts.current(run)}.json")
    return {**found, "attempt": repr((said["at_step"], said["how"]))}


def recover(state: State, run: Path, expected: dict[str, str | bytes], patch: pytest.MonkeyPatch) -> None:
    """Put the folder of a stop, look at it as a reader would, go on to the end; AssertionError if that is not right."""
    disk.put(state.tree, run)
    latest, best = checkpoint.latest(run), checkpoint.best(run)
    step = checkpoint.load(latest).global_step if latest else 0
    assert state.saved <= step <= state.saved + 1, f"the checkpoint of step {state.saved} is lost: latest is {step}"
    for link in (latest, best):
        if link is not None:
            loaded = checkpoint.load(link)
            for kind in ("weights", "exp_avg", "exp_avg_sq"):
                assert_equal(getattr(loaded.state, kind), getattr(made(loaded.global_step).state, kind))
    assert attempts.current(run) >= state.begun, "an attempt that begins may get an older one's number"
    if step:  # never a latest whose best_valid no checkpoint has
        assert best is not None
        assert int(best.name[5:]) >= max(number for number in BEST if number <= step)
    for folder in (run / "checkpoints").glob("step-*"):
        checkpoint.load(folder)  # whole or absent
    other = os.getpid() + 1
    with patch.context() as context:
        context.setattr(os, "getpid", lambda: other)
        context.setattr(os, "fsync", lambda handle: None)
        follow_through(run)
    assert ending(run) == expected
    shutil.rmtree(run)
