"""tools.validate: it finds what precompute and retarget do. (test_validate.py is of sm_train.train.validate.)"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sm_train.data.manifest import read_manifest
from sm_train.errors import UserError
from sm_train.models.speech import EncoderConfig
from sm_train.precompute import PrecomputeConfig, in_this_process, run
from tests import builders, corpora, storage
from tools import validate

TONE_S = corpora.tiny(1)[0].samples_S
SECONDS = len(TONE_S) / corpora.RATE_HZ


def rows_of(folder: Path, count: int = 6) -> list[dict[str, Any]]:
    """Good rows with their audio."""
    rows = []
    for i in range(count):
        corpora.write_audio(folder / f"{i}.flac", TONE_S)
        rows.append(builders.row(f"u{i}", f"{i}.flac", SECONDS, f"the small boat {i}", "train" if i else "dev"))
    return rows


def report(folder: Path, rows: list[dict[str, Any]], tasks: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    path = builders.write_manifest(folder / "m.jsonl", rows)
    instructions = builders.write_manifest(folder / "i.jsonl", tasks) if tasks is not None else None
    return validate.validate(path, instructions, 60.0, 4).as_mapping()


def found(report: dict[str, Any]) -> dict[str, tuple[str, list[int]]]:
    return {one["reason"]: (one["kind"], one["rows"]) for one in report["findings"]}


def test_a_good_manifest_has_its_facts_and_no_finding(tmp_path: Path) -> None:
    said = report(tmp_path, rows_of(tmp_path))
    assert said == {
        "ok": True, "utterances": 6, "hours": {"dev": SECONDS / 3600, "train": pytest.approx(SECONDS / 720)},
        "languages": {"en": 6}, "speakers": 1, "findings": [],
    }  # fmt: skip


def test_what_would_be_quarantined_is_what_precompute_quarantines(tmp_path: Path, encoder_folder: Path) -> None:
    rows = rows_of(tmp_path, 9)
    rows[1]["audio"] = "absent.flac"
    rows[2]["text"] = " "
    rows[3]["duration_s"] = SECONDS + 0.2
    rows[4] |= {"start_s": 0.1, "duration_s": 0.05}
    rows[5]["duration_s"] = 61.0
    (tmp_path / "6.flac").write_bytes(b"noise")
    corpora.write_audio(tmp_path / "7.flac", np.zeros(0))
    path = builders.write_manifest(tmp_path / "m.parquet", rows)
    encoder = EncoderConfig(path=str(encoder_folder), layer=2, device="cpu")
    cfg = PrecomputeConfig(str(path), str(tmp_path / "set"), encoder, [], max_quarantined_share=1.0)
    run(cfg, in_this_process)
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "set/quarantine.parquet").to_pylist()
    quarantined = {(row["id"], row["reason"]) for row in table}
    said = validate.validate(path, None, 60.0, 4)
    mine = {(f"u{row - 1}", f.reason) for f in said.findings.values() if f.kind == "quarantined" for row in f.rows}
    assert mine == quarantined
    assert {reason for _, reason in mine} >= {
        "missing_audio", "empty_text", "truncated", "too_short", "too_long", "undecodable"
    }  # fmt: skip
    assert not said.ok


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"id": ""}, "empty_id"),
        ({"id": "u0"}, "duplicate_id"),
        ({"duration_s": float("nan")}, "bad_time"),
        ({"duration_s": 0.0}, "bad_time"),
        ({"start_s": -1.0}, "bad_time"),
        ({"start_s": 1e308}, "bad_time"),
        ({"duration_s": 2e7}, "bad_time"),
        ({"duration_s": "long"}, "bad_time"),
        ({"duration_s": 10**400}, "bad_time"),
        ({"id": "a\tb"}, "bad_id"),
        ({"id": "a\x7f"}, "bad_id"),
        ({"id": "a" * 1001}, "bad_id"),
        ({"id": "\ud800"}, "bad_id"),
        ({"text": ["a"]}, "bad_value"),
        ({"text": "\ud800"}, "bad_value"),
    ],
)
def test_what_the_reader_refuses_is_refused_with_its_row_and_the_rest_is_still_checked(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    rows = rows_of(tmp_path)
    rows[2] |= change
    rows[4]["audio"] = "absent.flac"
    said = report(tmp_path, rows)
    assert found(said) == {reason: ("refused", [3]), "missing_audio": ("quarantined", [5])}
    with pytest.raises(UserError):
        read_manifest(tmp_path / "m.jsonl")


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    builders.write_manifest(tmp_path / "m.jsonl", rows_of(tmp_path))
    with (tmp_path / "m.jsonl").open("a") as file:
        file.write("{broken\n")
    said = validate.validate(tmp_path / "m.jsonl", None, 60.0, 2)
    assert said.findings["unreadable"].rows == [7]
    (tmp_path / "m.jsonl").write_text("")
    assert not validate.validate(tmp_path / "m.jsonl", None, 60.0, 2).ok
    with pytest.raises(UserError, match="does not exist"):
        validate.validate(tmp_path / "nowhere.parquet", None, 60.0, 2)


def test_audio_at_an_address_is_noted_and_not_read(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    for i in (1, 3):
        rows[i]["audio"] = f"s3://nowhere/{i}.flac"
    said = report(tmp_path, rows)
    assert said["ok"]
    assert found(said) == {"remote_audio": ("noted", [2, 4])}
    assert said["findings"][0]["count"] == 2
    assert said["findings"][0]["detail"].startswith("s3://nowhere/1.flac: ")
    said = validate.validate(tmp_path / "m.jsonl", None, 60.0, 4)
    assert str(said).endswith("\nevery row whose audio was read would be committed")
    rows[1]["text"], rows[3]["duration_s"] = "", 61.0
    quarantined = {"empty_text": ("quarantined", [2]), "too_long": ("quarantined", [4])}
    assert found(report(tmp_path, rows)) == {**quarantined, "remote_audio": ("noted", [2, 4])}


def test_a_manifest_and_instructions_at_an_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of(tmp_path)
    rows[2]["audio"] = str(tmp_path / "2.flac")
    builders.write_manifest(tmp_path / "m.parquet", rows)
    builders.write_manifest(tmp_path / "i.jsonl", [{"utterance_id": "u1", "task": "asr", "answer": "x"}])
    monkeypatch.setattr("sm_train.data.remote._PAUSE_S", 0.001)
    with storage.s3_server(monkeypatch) as server:
        storage.upload(server, tmp_path, "bucket/corpora")
        at = "s3://bucket/corpora"
        validate.main([f"{at}/m.parquet", "--instructions", f"{at}/i.jsonl", "--json"])
        said = json.loads(capsys.readouterr().out)
        assert (said["ok"], said["utterances"], said["instructions"]) == (True, 6, {"asr": 1})
        assert found(said) == {"remote_audio": ("noted", [1, 2, 4, 5, 6])}
        assert said["findings"][0]["detail"].startswith(f"{at}/0.flac: ")
        for argv in ([f"{at}/absent.parquet"], [f"{at}/m.parquet", "--instructions", f"{at}/absent.jsonl"]):
            with pytest.raises(UserError, match=f"^file {argv[-1]} does not exist$"):
                validate.main(argv)


def test_odd_rows_are_noted_and_leave_the_manifest_good(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, 24)
    corpora.write_audio(tmp_path / "1.flac", TONE_S, 8_000)
    rows[1]["duration_s"] = 2 * SECONDS
    corpora.write_audio(tmp_path / "2.flac", np.stack([TONE_S, TONE_S], axis=1))
    rows[3]["duration_s"] = SECONDS / 2
    rows[4]["audio"] = "5.flac"
    rows[6]["text"] = rows[7]["text"]
    rows[8]["text"] = "word " * 40
    said = report(tmp_path, rows)
    assert said["ok"]
    assert found(said) == {
        "sample_rate": ("noted", [2]), "channels": ("noted", [3]), "rest_unused": ("noted", [4]),
        "same_audio": ("noted", [6]), "same_text": ("noted", [8]), "odd_rate": ("noted", [9]),
    }  # fmt: skip


def test_instructions_are_checked_against_the_manifest(tmp_path: Path) -> None:
    def task(**values: Any) -> dict[str, Any]:
        return {"utterance_id": "u1", "task": "st", "target_lang": "fr", "answer": "x", **values}

    tasks = [
        task(), task(utterance_id="u2"), task(utterance_id="stranger"), task(), task(task="dance"), task(answer=""),
        task(target_lang="xx"), task(target_lang="yy", variables={"target_language": "Old Yy"}), task(task="asr"),
    ]  # fmt: skip
    said = report(tmp_path, rows_of(tmp_path), tasks)
    assert found(said) == {
        "unknown_utterance": ("refused", [3]), "duplicate_instruction": ("refused", [4]),
        "bad_instruction": ("refused", [5, 6]), "unknown_language": ("refused", [7]),
    }  # fmt: skip
    assert said["instructions"] == {"asr": 1, "st-fr": 4, "st-xx": 1, "st-yy": 1}


def test_the_command_s_exit_code_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(tmp_path)
    path = builders.write_manifest(tmp_path / "m.parquet", rows)
    validate.main([str(path)])
    assert capsys.readouterr().out.endswith("every row would be committed\n")
    (tmp_path / "3.flac").unlink()
    with pytest.raises(SystemExit) as left:
        validate.main([str(path)])
    assert left.value.code == 2
    assert "quarantined: 1 missing_audio, row 4 (" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        validate.main([str(path), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert (said["ok"], said["findings"][0]["rows"]) == (False, [4])
