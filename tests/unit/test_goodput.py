"""Where a run's time went: hand-made logs with known answers."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from sm_train.errors import UserError
from tools import goodput

T0 = 1_750_000_000.0


def at(seconds: float) -> str:
    return datetime.fromtimestamp(T0 + seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def start(number: int, started: float, began: float, from_step: int = 0, **facts: Any) -> dict[str, Any]:
    """What attempts/N.json says; ``ended`` in seconds and ``found`` as (attempt, step, seconds)."""
    said = {"attempt": number, "started": at(started), "began": at(began), "from_step": from_step, "found": {}}
    if "ended" in facts:
        said |= {"ended": at(facts["ended"]), "how": facts["how"], "at_step": facts["at_step"]}
    if "found" in facts:
        attempt, step, seconds = facts["found"]
        said["found"] = {"attempt": attempt, "step": step, "time_s": T0 + seconds}
    return said


def line(attempt: int, step: int, seconds: float, **facts: Any) -> dict[str, Any]:
    return {"attempt": attempt, "step": step, "time_s": T0 + seconds, **facts}


def seconds_of(starts: list[dict[str, Any]], lines: list[dict[str, Any]]) -> dict[str, float]:
    found = goodput.account(starts, lines)
    assert sum(found.seconds.values()) == pytest.approx(found.wall_s)
    return {kind: round(value, 6) for kind, value in found.seconds.items() if round(value, 6)}


def test_a_run_that_nobody_disturbs_is_steps_behind_a_start() -> None:
    lines = [line(1, step, 3 + step, **({"checkpoint_s": 0.25} if step == 3 else {})) for step in range(1, 5)]
    starts = [start(1, 0, 2.5, ended=8, how="complete", at_step=4)]
    # The first step is reckoned at the usual second; the save of the last step is written after it.
    assert seconds_of(starts, lines) == {"restart": 3.0, "steps": 3.75, "checkpoint": 1.25}
    found = goodput.account(starts, lines)
    assert (found.wall_s, found.goodput, found.losses, found.lost_steps) == (8.0, 3.75 / 8, 0, 0)


def test_a_killed_start_loses_the_steps_since_its_checkpoint_and_the_time_until_the_next() -> None:
    starts = [
        start(1, 0, 2),
        start(2, 20, 22, from_step=2, found=(1, 5, 8.0), ended=30, how="complete", at_step=4),
    ]
    lines = [line(1, 1, 4), line(1, 2, 5), line(2, 3, 25), line(2, 4, 26)]
    assert seconds_of(starts, lines) == {
        "restart": 3 + 4, "steps": 2 + 2, "replay": 3, "detect": 12, "checkpoint": 4,
    }  # fmt: skip
    found = goodput.account(starts, lines)
    assert (found.starts, found.losses, found.lost_steps) == (2, 1, 3)


def test_a_start_that_could_say_that_it_lost_a_rank_is_detected_then_and_idle_after() -> None:
    how = "rank 1 (host b, pid 2) has not been heard from for 10 s"
    starts = [
        start(1, 0, 2, ended=16, how=how, at_step=2),
        start(2, 100, 102, from_step=2, found=(1, 2, 5.0)),
    ]
    lines = [line(1, 1, 4), line(1, 2, 5), line(2, 3, 104)]
    assert seconds_of(starts, lines) == {"restart": 3 + 3, "steps": 3, "detect": 11, "idle": 84}
    assert goodput.account(starts, lines).losses == 1


def test_a_signal_loses_nothing() -> None:
    starts = [
        start(1, 0, 2, ended=6, how="SIGUSR1", at_step=2),
        start(2, 10, 12, from_step=2, found=(1, 2, 5.0), ended=15, how="complete", at_step=3),
    ]
    lines = [line(1, 1, 4), line(1, 2, 5), line(2, 3, 14)]
    assert seconds_of(starts, lines) == {"restart": 3 + 3, "steps": 3, "checkpoint": 2, "idle": 4}
    found = goodput.account(starts, lines)
    assert (found.losses, found.lost_steps) == (0, 0)


def test_starts_that_left_no_line_or_no_word() -> None:
    starts = [
        start(1, 0, 2),  # took three steps, had no checkpoint
        start(2, 10, 12, found=(1, 3, 6.0)),  # killed before its first step
        start(4, 20, 22, found=(1, 3, 6.0), ended=26, how="complete", at_step=2),  # 3 was killed as it began
    ]
    lines = [line(4, 1, 24), line(4, 2, 25)]
    # 2 found the log of 1 uncut, and so did 4: what 1 lost counts once.
    assert seconds_of(starts, lines) == {
        "restart": 2 + 2 + 3, "replay": 4, "detect": 4 + 8, "steps": 2, "checkpoint": 1,
    }  # fmt: skip
    found = goodput.account(starts, lines)
    assert (found.losses, found.lost_steps) == (2, 3)


def test_clocks_that_disagree_make_no_negative_time() -> None:
    # 1 ends behind the start of 2: the time from there on is 2's.
    starts = [start(1, 0, 2, ended=9, how="SIGTERM", at_step=2), start(2, 6, 7, from_step=2)]
    assert seconds_of(starts, [line(1, 1, 4), line(1, 2, 5), line(2, 3, 8)]) == {
        "restart": 3 + 1, "steps": 2 + 1, "checkpoint": 1,
    }  # fmt: skip


def test_the_ceiling_and_the_best_interval() -> None:
    assert goodput.best_interval(0.3, 180) == pytest.approx(10.392, abs=1e-3)
    for between_s, expected in ((60, 0.82), (180, 0.91), (300, 0.94), (600, 0.96), (3600, 0.98)):
        best_s = goodput.best_interval(0.3, between_s)
        assert goodput.ceiling(0.3, best_s, between_s, 5) == pytest.approx(expected, abs=0.006)
        assert goodput.ceiling(0.3, best_s, between_s, 5) > goodput.ceiling(0.3, 2 * best_s, between_s, 5)


def write(run: Path, starts: list[dict[str, Any]], lines: list[dict[str, Any]]) -> Path:
    (run / "attempts").mkdir(parents=True)
    for said in starts:
        (run / f"attempts/{said['attempt']}.json").write_text(json.dumps(said))
    (run / "attempts/3.json").touch()
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines) + '{"attempt": 1, "st')
    (run / "config.yaml").write_text("loop: {save_every: 2}")
    return run


def test_the_command_prints_the_shares_and_what_the_losses_allow(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    starts = [start(1, 0, 2), start(2, 20, 22, from_step=4, found=(1, 5, 8.0))]
    lines = [line(1, s, 3 + s, **({"checkpoint_s": 0.1} if s == 3 else {})) for s in range(1, 5)] + [line(2, 5, 30)]
    goodput.main([str(write(tmp_path / "run", starts, lines))])
    out = capsys.readouterr().out
    assert "5 steps, 2 starts, 1 of them lost, with 1 steps" in out
    assert "steps               4.9 s   16.3%" in out
    assert "wall time          30.0 s" in out
    assert "goodput (ETTR) 0.163" in out
    assert "loop.save_every=2" in out  # sqrt(2 * 0.1 * 30) = 2.4 s


def test_a_folder_that_is_no_run_and_an_old_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no attempts"):
        goodput.main([str(tmp_path)])
    with pytest.raises(UserError, match="usage"):
        goodput.main([])
    old = write(tmp_path / "old", [{"attempt": 1, "began": at(0), "from_step": 0}], [{"attempt": 1, "step": 1}])
    with pytest.raises(UserError, match="did not note the time"):
        goodput.main([str(old)])
