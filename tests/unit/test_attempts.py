"""Attempts: numbered once each, a newer one fences the older off, each tells its end."""

from __future__ import annotations

import threading
import time
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from sm_train import files
from sm_train.errors import UserError
from sm_train.train import attempts


def test_attempts_count_up_and_only_the_newest_is_current(tmp_path: Path) -> None:
    assert attempts.current(tmp_path) == 0
    assert [attempts.begin(tmp_path) for _ in range(12)] == list(range(1, 13))
    assert attempts.current(tmp_path) == 12  # by number, not by name
    attempts.require_current(tmp_path, 12)
    with pytest.raises(UserError, match="attempt 12 has begun since; attempt 9 leaves without writing"):
        attempts.require_current(tmp_path, 9)


def test_starts_at_once_get_a_number_each(tmp_path: Path) -> None:
    numbers: list[int] = []
    gate = threading.Barrier(8)

    def start() -> None:
        gate.wait()
        numbers.append(attempts.begin(tmp_path))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 9))


def test_an_attempt_says_who_began_it_and_how_it_ended(tmp_path: Path) -> None:
    number = attempts.begin(tmp_path, from_step=40, ranks=2)
    said = files.read_json(tmp_path / "attempts/1.json")
    assert {"host", "pid", "began"} <= said.keys()
    assert (said["attempt"], said["from_step"], said["ranks"]) == (1, 40, 2)
    assert "ended" not in said
    attempts.end(tmp_path, number, 55, "SIGTERM")
    said = files.read_json(tmp_path / "attempts/1.json")
    assert (said["at_step"], said["how"], said["from_step"]) == (55, "SIGTERM", 40)


def test_an_attempt_says_when_its_process_was_started_and_what_log_it_found(tmp_path: Path) -> None:
    before_s = time.time()
    number = attempts.begin(tmp_path, found={"attempt": 1, "step": 7, "time_s": 1.5})
    said = attempts.read(tmp_path, number)
    assert said["found"] == {"attempt": 1, "step": 7, "time_s": 1.5}
    started_s, began_s = (datetime.fromisoformat(said[name]).timestamp() for name in ("started", "began"))
    assert before_s - 0.001 <= began_s <= time.time()
    assert started_s == pytest.approx(psutil.Process().create_time(), abs=1.5)  # which counts from a whole second
    assert attempts.read(tmp_path, attempts.begin(tmp_path))["found"] == {}


def test_a_start_that_was_killed_before_it_wrote_a_word_counts(tmp_path: Path) -> None:
    attempts.begin(tmp_path)
    (tmp_path / "attempts/2.json").touch()
    assert attempts.begin(tmp_path) == 3
