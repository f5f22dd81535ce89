"""Checkpoints: whole or absent under a stop after every file-system call, and fenced by attempts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sm_train.data.plan import Position
from sm_train.errors import UserError
from sm_train.train import attempts, checkpoint
from sm_train.train.engines.base import TrainState
from tests.chaos import saves
from tests.training import assert_equal

DESCRIPTION = {"model_type": "speech_mapper"}


def made(step: int, best_valid: float | None = 0.5) -> checkpoint.Checkpoint:
    generator = torch.Generator().manual_seed(step)
    tensors = [{name: torch.randn(3, 2, generator=generator) for name in ("a.weight", "b.weight")} for _ in range(3)]
    state = TrainState(*tensors, adam_step=step - 1, scaler={"cur_scale": 2.0**step})
    return checkpoint.Checkpoint(
        state, step, Position(step // 10, step % 10), {"seed": 3, "widths": [1, 2]}, best_valid
    )


def assert_same(one: checkpoint.Checkpoint, other: checkpoint.Checkpoint) -> None:
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        assert_equal(getattr(one.state, kind), getattr(other.state, kind))
    assert (one.state.adam_step, one.state.scaler) == (other.state.adam_step, other.state.scaler)
    assert (one.global_step, one.position, one.contract, one.best_valid) == (
        other.global_step, other.position, other.contract, other.best_valid,
    )  # fmt: skip


def save(run: Path, step: int, attempt: int = 1, *, is_best: bool = False, keep: int = 2) -> None:
    checkpoint.save(run, attempt, made(step), DESCRIPTION, is_best=is_best, keep=keep)


def pointed(link: Path | None) -> checkpoint.Checkpoint:
    assert link is not None
    return checkpoint.load(link)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    assert attempts.begin(tmp_path) == 1
    return tmp_path


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if not path.is_symlink())


def test_a_checkpoint_comes_back_as_it_was(run: Path) -> None:
    assert checkpoint.latest(run) is None
    assert checkpoint.best(run) is None
    save(run, 13)
    assert_same(pointed(checkpoint.latest(run)), made(13))
    assert_same(checkpoint.load(run / "checkpoints" / "step-13"), made(13))
    assert json.loads((run / "checkpoints/latest/config.json").read_text()) == DESCRIPTION
    names = {"config.json", "mapper.safetensors", "moments.safetensors", "state.json"}
    assert {path.name for path in (run / "checkpoints" / "step-13").iterdir()} == names


def test_latest_and_best_point_at_their_steps_and_the_rest_goes(run: Path) -> None:
    save(run, 2, is_best=True)
    for step in (4, 6, 8, 10):
        save(run, step)
    assert os.readlink(run / "checkpoints/latest") == "step-10"
    assert os.readlink(run / "checkpoints/best") == "step-2"
    assert steps(run) == ["step-10", "step-2", "step-8"]
    save(run, 12, is_best=True, keep=1)
    assert steps(run) == ["step-12"]
    assert_same(pointed(checkpoint.best(run)), made(12))


def test_without_validation_the_best_is_the_latest(run: Path) -> None:
    save(run, 2)
    save(run, 4)
    assert_same(pointed(checkpoint.best(run)), made(4))


def test_a_moved_run_folder_keeps_its_links(run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    save(run, 2)
    moved = tmp_path_factory.mktemp("moved") / "run"
    run.rename(moved)
    assert_same(pointed(checkpoint.latest(moved)), made(2))


@pytest.mark.parametrize("begin", [saves.new, saves.went_further])
def test_a_stop_after_any_call_of_a_run_leaves_whole_checkpoints_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin: Callable[[Path], object]
) -> None:
    """Attempts, log and saves; the process dies, or power is lost and what was not synced is there, cut or missing."""
    found = saves.all_recovered(tmp_path, begin, monkeypatch, thorough=False)
    names = {state.call.split()[0] for state in found.states}
    assert {"mkdir", "open", "save_file", "write_bytes", "rename", "replace", "symlink", "unlink", "line"} <= names
    assert found.calls > 100
    assert len(found.states) > 150
    assert {state.saved for state in found.states} >= {1, 2, 3, 4}


def test_an_older_attempt_leaves_without_writing(run: Path) -> None:
    save(run, 2)
    assert attempts.begin(run) == 2
    with pytest.raises(UserError, match="attempt 2 has begun since; attempt 1 leaves without writing"):
        save(run, 4, attempt=1)
    assert_same(pointed(checkpoint.latest(run)), made(2))
    assert not (run / "checkpoints/step-4").exists()
    save(run, 4, attempt=2)
    assert_same(pointed(checkpoint.latest(run)), made(4))


def test_the_step_that_latest_points_at_is_not_written_again(run: Path) -> None:
    save(run, 2)
    before = (run / "checkpoints/step-2").stat().st_ino
    save(run, 2)
    assert (run / "checkpoints/step-2").stat().st_ino == before


@pytest.mark.parametrize("name", ["mapper.safetensors", "moments.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_damaged_checkpoint_is_an_error_that_names_it(run: Path, name: str, damage: str) -> None:
    save(run, 2)
    path = run / "checkpoints/step-2" / name
    data = path.read_bytes()
    path.unlink()
    if damage == "short":
        path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="step-2"):
        pointed(checkpoint.latest(run))


def test_find_takes_a_run_s_best_or_latest_or_a_checkpoint_folder(run: Path) -> None:
    save(run, 2, is_best=True)
    save(run, 4)
    folder = run / "checkpoints"
    assert checkpoint.find(run) == folder / "step-2"
    assert checkpoint.find(run, "best") == folder / "step-2"
    assert checkpoint.find(run, "latest") == folder / "step-4"
    assert checkpoint.find(run, str(folder / "step-4")) == folder / "step-4"
    assert checkpoint.find(folder / "step-4") == folder / "step-4"
    assert checkpoint.load(checkpoint.find(folder / "latest")).global_step == 4


def test_find_without_validation_is_the_latest(run: Path) -> None:
    save(run, 2)
    assert checkpoint.find(run) == run / "checkpoints/step-2"


@pytest.mark.parametrize("name", ["best", "latest", "/nowhere/step-3"])
def test_a_run_without_such_a_checkpoint_names_it(run: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"run {run} has no checkpoint '{name}'; train it first, or name a checkpoint"):
        checkpoint.find(run, name)
    with pytest.raises(UserError, match=r"run /nowhere/run does not exist"):
        checkpoint.find(Path("/nowhere/run"), name)


def test_a_step_that_another_attempt_left_beyond_latest_is_written_anew(run: Path) -> None:
    """As after a damaged checkpoint, when a person has pointed latest at the one before."""
    save(run, 2)
    save(run, 4)
    (run / "checkpoints/step-4/mapper.safetensors").write_bytes(b"damaged")
    checkpoint._point(run / "checkpoints/latest", "step-2")
    save(run, 4, attempts.begin(run))
    assert_same(pointed(checkpoint.latest(run)), made(4))
    assert steps(run) == ["step-2", "step-4"]


def test_a_link_that_became_a_copy_is_refused(run: Path) -> None:
    save(run, 2)
    (run / "checkpoints/latest").unlink()
    (run / "checkpoints/latest").mkdir()
    with pytest.raises(UserError, match="latest is no link but a copy; make it one again: ln -s step-N"):
        checkpoint.latest(run)


def test_a_run_whose_links_are_lost_goes_on_from_its_last_whole_step(run: Path) -> None:
    save(run, 2, is_best=True)
    save(run, 4)
    for link in ("latest", "best"):
        (run / "checkpoints" / link).unlink()
    assert checkpoint.latest(run) == run / "checkpoints/step-4"
    save(run, 6)
    assert os.readlink(run / "checkpoints/latest") == "step-6"
    assert os.readlink(run / "checkpoints/best") == "step-4"  # its best figure is all that is known


@pytest.mark.parametrize("name", ["state.json", "mapper.safetensors", "moments.safetensors"])
def test_a_damaged_checkpoint_is_named_with_another_to_go_on_from(run: Path, name: str) -> None:
    save(run, 2)
    save(run, 4)
    path = run / "checkpoints/step-4" / name
    data = path.read_bytes()
    path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    with pytest.raises(UserError, match=r"step-4 is damaged .*ln -sfn step-2 .*checkpoints/latest"):
        checkpoint.load(run / "checkpoints/step-4")


def test_others_may_read_what_is_saved(run: Path) -> None:
    save(run, 2)
    modes = {path.stat().st_mode & 0o777 for path in (run / "checkpoints/step-2").iterdir()}
    assert len(modes) == 1
