"""Saving beside the training: one at a time, and what a disk that fails does."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from sm_train.train import attempts, checkpoint
from sm_train.train.saver import Saver
from tests.unit.test_checkpoint import DESCRIPTION, assert_same, made


@pytest.fixture
def run(tmp_path: Path) -> Path:
    assert attempts.begin(tmp_path) == 1
    return tmp_path


def saver(run: Path, on_error: str = "stop") -> Saver:
    return Saver(run, 1, DESCRIPTION, keep=2, on_error=on_error)


def test_what_is_saved_beside_the_training_comes_back(run: Path) -> None:
    with saver(run) as made_saver:
        for step in (3, 6, 9):
            made_saver.start(made(step), is_best=step == 3)
    assert made_saver.trouble is None
    latest = checkpoint.latest(run)
    assert latest is not None
    assert_same(checkpoint.load(latest), made(9))
    best = checkpoint.best(run)
    assert best is not None
    assert best.name == "step-3"


def test_training_goes_on_while_a_checkpoint_is_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, real = threading.Event(), checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *args, **kwargs: gate.wait(10) and real(*args, **kwargs))
    with saver(run) as made_saver:
        made_saver.start(made(3), is_best=False)
        assert not made_saver.is_in_trouble()  # asked at every step, and never waits
        assert checkpoint.latest(run) is None
        gate.set()
    assert checkpoint.latest(run) == run / "checkpoints/step-3"


@pytest.mark.parametrize("on_error", ["stop", "go_on"])
def test_a_full_disk_stops_or_goes_on_and_costs_nothing_that_was_there(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], on_error: str
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with saver(run, on_error) as made_saver:
        made_saver.start(made(3), is_best=False)
        made_saver.wait()
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save_file", full)
            made_saver.start(made(6), is_best=False)
            made_saver.wait()
        assert made_saver.is_in_trouble() == (on_error == "stop")
        assert [path.name for path in (run / "checkpoints").iterdir() if not path.is_symlink()] == ["step-3"]
        latest = checkpoint.latest(run)
        assert latest is not None
        assert_same(checkpoint.load(latest), made(3))
        if on_error == "go_on":
            made_saver.start(made(9), is_best=False)
    said = made_saver.trouble or capsys.readouterr().out
    assert "the checkpoint of step 6 (0 MB) could not be written: No space left on device" in said
    assert "its newest checkpoint is step-3" in said
    assert checkpoint.latest(run) == run / "checkpoints" / ("step-3" if on_error == "stop" else "step-9")


def test_a_newer_attempt_stops_this_one_whatever_errors_do(run: Path) -> None:
    with saver(run, "go_on") as made_saver:
        attempts.begin(run)
        made_saver.start(made(3), is_best=False)
    assert made_saver.trouble is not None
    assert "attempt 2 has begun since" in made_saver.trouble
    assert checkpoint.latest(run) is None


def test_a_bug_in_saving_is_not_taken_for_a_full_disk(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_write", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError), saver(run, "go_on") as made_saver:
        made_saver.start(made(3), is_best=False)
