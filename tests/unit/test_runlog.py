from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from sm_train import runlog


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_cut_back_to_the_checkpoints_step_on_resume(tmp_path: Path) -> None:
    log = runlog.RunLog(tmp_path, attempt=1, resume_step=0)
    for step in (1, 2, 3):
        log.write(step, {"loss": step / 2, "ids": ["a"]})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"attempt": 1, "step": 4, "lo')  # killed in the middle of a line
    log = runlog.RunLog(tmp_path, attempt=2, resume_step=2)
    log.write(3, {"loss": 9.0})
    log.close()
    assert [(row["step"], row["attempt"], row["loss"]) for row in lines(tmp_path)] == [
        (1, 1, 0.5),
        (2, 1, 1.0),
        (3, 2, 9.0),
    ]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_the_last_line_is_the_last_whole_one_and_says_when(tmp_path: Path) -> None:
    assert runlog.last_line(tmp_path) == {}
    begun_s = time.time()
    log = runlog.RunLog(tmp_path, attempt=3, resume_step=0)
    for step in (1, 2):
        log.write(step, {"loss": step / 2})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"attempt": 3, "step": 3, "ti')
    found = runlog.last_line(tmp_path)
    assert (found["attempt"], found["step"]) == (3, 2)
    assert begun_s - 0.001 <= found["time_s"] <= time.time() + 0.001
    (tmp_path / "metrics.jsonl").write_text('{"attempt": 1, "step": 1}\n')  # of a version that did not say when
    assert runlog.last_line(tmp_path) == {}


def test_tensorboard_that_cannot_write_any_more_costs_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    log = runlog.RunLog(tmp_path, attempt=1, resume_step=0)
    monkeypatch.setattr(log._board, "add_scalar", full)
    for step in (1, 2, 3):
        log.write(step, {"loss": step / 2})
    log.close()
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3]
    assert capsys.readouterr().out.count("events cannot be written any more: No space left on device") == 1


def test_clock() -> None:
    assert [runlog.clock(s) for s in (0, 61.9, 3661, float("inf"))] == ["0:00:00", "0:01:01", "1:01:01", "?"]


def test_say_speaks_on_rank_0_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    runlog.say("one")
    monkeypatch.setenv("RANK", "1")
    runlog.say("two")
    assert capsys.readouterr().out == "one\n"
