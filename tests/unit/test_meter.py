"""What a run measures: lines of log.jsonl, and the line on the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sm_train import meter
from sm_train.meter import Incident, Meter
from sm_train.records import Quarantined, Receipt


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still unless it is told."""
    at = [100.0]
    monkeypatch.setattr(meter.time, "monotonic", lambda: at[0])
    return at


def receipt(part: int, *reasons: str, audio_s: float = 360.0, encode_s: float = 3.0) -> Receipt:
    return Receipt(f"part-{part:07d}", 4, len(reasons), audio_s, encode_s, 0.5, 6.0, reasons, "host:7")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_log_has_a_line_a_unit_and_one_at_the_end(tmp_path: Path, now: list[float]) -> None:
    log = tmp_path / "log.jsonl"
    with Meter(3600, 2, log) as measured:
        measured.add(receipt(0, "silent", "silent", "too_long"))
        measured.add(Incident("death", "host:8", units=2, detail="its node has died"))
        measured.add(Incident("probe", "host:9", "part-0000001"))
        measured.add(Incident("barred", "host:9", "part-0000001", Quarantined("u", "crashes_encoder", "why")))
        measured.add(receipt(1, "crashes_encoder"))
        measured.add(Incident("dispatch", seconds=0.1))
        now[0] += 10
    first, death, probe, barred, second, end = lines(log)
    assert (first["part"], first["worker"], first["quarantined"]) == (
        "part-0000000", "host:7", {"silent": 2, "too_long": 1},
    )  # fmt: skip
    assert (first["audio_s"], first["encode_s"], first["write_s"], first["wall_s"]) == (360.0, 3.0, 0.5, 6.0)
    assert [line["event"] for line in (death, probe, barred, second, end)] == [
        "death", "probe", "barred", "unit", "end",
    ]  # fmt: skip
    assert (death["units"], death["detail"]) == (2, "its node has died")
    assert barred["row"]["id"] == "u"
    assert end["hours"] == pytest.approx(0.2)
    assert (end["times_real_time"], end["encoder_busy_share"], end["dispatch_share"]) == (72.0, 0.3, 0.01)
    assert (end["committed"], end["deaths"], end["probes"], end["barred"]) == (8, 1, 1, 1)
    assert end["quarantined"] == {"silent": 2, "too_long": 1, "crashes_encoder": 1}


def test_half_a_line_of_a_killed_run_spoils_no_other(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"event": "unit"}\n{"event": "un')
    with Meter(1, 1, log) as measured:
        measured.add(receipt(0))
    found = log.read_text().splitlines()
    assert found[1] == '{"event": "un'
    assert [json.loads(line)["event"] for line in found[2:]] == ["unit", "end"]


def test_the_terminal_says_hours_speed_busy_share_and_reasons(
    capsys: pytest.CaptureFixture[str], now: list[float]
) -> None:
    with Meter(7200, 1, None) as measured:
        now[0] += 11
        measured.add(receipt(0, "silent", "silent", "too_long", encode_s=5.5))
        measured.add(receipt(1, encode_s=0.0))
    first, last = capsys.readouterr().err.splitlines()
    assert first == (
        "precompute: 0.10 of 2.00 h audio, 33x real time, encoders 50% busy, "
        "3 quarantined (2 silent, 1 too_long), ETA 0:03:29"
    )
    assert "0.20 of 2.00 h" in last


def test_nothing_done_is_nothing_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Meter(0, 1, tmp_path / "log.jsonl"):
        pass
    assert capsys.readouterr().err == ""
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_of_a_long_log_only_the_end_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("{}\n")
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("the whole log is read"))
    with Meter(1, 1, log) as measured:
        measured.add(receipt(0))
    assert [line.get("event") for line in lines(log)] == [None, "unit", "end"]
