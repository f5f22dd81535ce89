from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sm_train.data import manifest
from sm_train.errors import UserError
from tests import builders, storage

ROWS = [builders.row(f"u{i}", f"{i}.flac", 1.0 + i / 3, f"text {i} é") for i in range(5)]


def test_parquet_and_jsonl_of_the_same_rows_are_the_same_manifest(tmp_path: Path) -> None:
    parquet = manifest.read_manifest(builders.write_manifest(tmp_path / "m.parquet", ROWS))
    jsonl = manifest.read_manifest(builders.write_manifest(tmp_path / "m.jsonl", ROWS))
    assert parquet == jsonl
    assert manifest.manifest_hash(parquet) == manifest.manifest_hash(jsonl)
    assert [u.id for u in parquet] == ["u0", "u1", "u2", "u3", "u4"]
    assert manifest.manifest_hash(parquet[::-1]) != manifest.manifest_hash(parquet)


def test_optional_columns_have_defaults_and_others_are_ignored(tmp_path: Path) -> None:
    rows = [{"id": "2024-01-01", "audio": "a", "duration_s": 2, "text": "1999-12-31", "more": {"x": 1}}]
    (found,) = manifest.read_manifest(builders.write_manifest(tmp_path / "m.jsonl", rows))
    assert (found.id, found.text, found.duration_s) == ("2024-01-01", "1999-12-31", 2.0)
    assert (found.start_s, found.lang, found.speaker, found.split) == (0.0, "", "", "train")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"id": ""}, "row 3: the id is empty"),
        ({"id": None}, "row 3: the id is empty"),
        ({"id": "u0"}, "id 'u0' stands in row 1 and in row 3"),
        ({"duration_s": 0.0}, r"row 3 \(id 'u2'\): duration_s is 0.0"),
        ({"duration_s": None}, "duration_s is None"),
        ({"duration_s": float("nan")}, "duration_s is nan"),
        ({"duration_s": -1.0}, "duration_s is -1.0"),
        ({"start_s": -0.5}, "start_s is -0.5"),
        ({"id": "a\tb"}, r"row 3: the id 'a\\tb' has a control character"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, change: dict[str, object], says: str) -> None:
    rows = [*ROWS[:2], {**ROWS[2], **change}, *ROWS[3:]]
    for name in ("m.parquet", "m.jsonl"):
        with pytest.raises(UserError, match=says):
            manifest.read_manifest(builders.write_manifest(tmp_path / name, rows))


@pytest.mark.parametrize(
    ("change", "reason", "identity"),
    [
        ({"id": None}, "empty_id", ""),
        ({"id": "u0"}, "duplicate_id", ""),
        ({"id": "a" * 1001}, "bad_id", ""),
        ({"id": "\udfff"}, "bad_id", ""),
        ({"duration_s": 10**400}, "bad_time", "u2"),
        ({"start_s": 1e8}, "bad_time", "u2"),
        ({"start_s": [1]}, "bad_time", "u2"),
        ({"speaker": b"x"}, "bad_value", "u2"),
    ],
)
def test_a_bad_row_has_a_reason(change: dict[str, object], reason: str, identity: str) -> None:
    first_row = {"u0": 1}
    assert manifest.check_row(ROWS[1], 2, first_row).id == "u1"
    with pytest.raises(manifest.BadRow) as error:
        manifest.check_row({**ROWS[2], **change}, 3, first_row)
    assert (error.value.reason, error.value.id) == (reason, identity)
    assert first_row["u1"] == 2


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    def says(name: str, content: bytes, text: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=text) as error:
            manifest.read_manifest(tmp_path / name)
        assert "\n" not in str(error.value)

    with pytest.raises(UserError, match="does not exist"):
        manifest.read_manifest(tmp_path / "absent.parquet")
    says("a.parquet", b"PAR1 not at all", "cannot be read as Parquet")
    says("a.jsonl", b'{"id": "a"\n', "line 1: not JSON")
    says("b.jsonl", b'{"id": "\xff"}\n', "line 1: not JSON")
    says("c.jsonl", b"[1]\n", "line 1: a JSON object is wanted")
    says("d.jsonl", json.dumps({**ROWS[0], "duration_s": "long"}).encode(), "'long'")
    says("e.jsonl", b"\n", "holds no utterance")
    says("f.jsonl", b'{"id": "a", "audio": "x", "duration_s": 1.0}', "no column 'text'")
    pq.write_table(pa.table({"id": ["a"], "text": ["b"]}), tmp_path / "g.parquet")
    with pytest.raises(UserError, match="no column 'audio'; there are id, text"):
        manifest.read_manifest(tmp_path / "g.parquet")


def test_units_are_consecutive_rows(tmp_path: Path) -> None:
    utterances = manifest.read_manifest(builders.write_manifest(tmp_path / "m.parquet", ROWS))
    units = manifest.cut_units(utterances, 2)
    assert [unit.part for unit in units] == ["part-0000000", "part-0000001", "part-0000002"]
    assert [u for unit in units for u in unit.utterances] == utterances
    assert len(units[-1].utterances) == 1


def test_instructions_of_both_formats(tmp_path: Path) -> None:
    rows = [
        {"utterance_id": "u0", "task": "asr", "variables": None, "target_lang": "en", "answer": "a"},
        {
            "utterance_id": "u0",
            "task": "sqa",
            "variables": '{"question": "who?", "n": 2}',
            "target_lang": "de",
            "answer": "b",
        },
    ]
    parquet = manifest.read_instructions(builders.write_manifest(tmp_path / "i.parquet", rows))
    jsonl = manifest.read_instructions(builders.write_manifest(tmp_path / "i.jsonl", rows))
    assert parquet == jsonl
    assert parquet[1].variables == {"question": "who?", "n": "2"}
    plain = [{"utterance_id": "u0", "task": "sqa", "variables": {"source": "x"}, "answer": "c"}]
    (task,) = manifest.read_instructions(builders.write_manifest(tmp_path / "j.jsonl", plain))
    assert (task.variables, task.target_lang) == ({"source": "x"}, "en")
    for change, says in (
        ({"task": "sing"}, "'sing'"),
        ({"task": "st", "target_lang": None}, "needs a target_lang"),
        ({"variables": "{"}, "JSON"),
        ({"variables": "[1]"}, "JSON"),
    ):
        path = builders.write_manifest(tmp_path / "bad.jsonl", [{**rows[0], **change}])
        with pytest.raises(UserError, match=says):
            manifest.read_instructions(path)


def test_a_variable_that_is_null_is_not_there(tmp_path: Path) -> None:
    row = {
        "utterance_id": "u0",
        "task": "sqa",
        "variables": {"question": None, "n": 2},
        "target_lang": 7,
        "answer": "a",
    }
    (task,) = manifest.read_instructions(builders.write_manifest(tmp_path / "i.jsonl", [row]))
    assert (task.variables, task.target_lang) == ({"n": "2"}, "7")


@pytest.mark.parametrize("answer", [None, "", "  ", "\u3000"])
def test_an_answer_of_nothing_is_refused(tmp_path: Path, answer: str | None) -> None:
    row = {"utterance_id": "u0", "task": "asr", "variables": None, "target_lang": "en", "answer": answer}
    with pytest.raises(UserError, match="row 1: the answer is empty"):
        manifest.read_instructions(builders.write_manifest(tmp_path / "i.jsonl", [row]))


def test_manifests_and_instructions_at_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sm_train.data.remote._PAUSE_S", 0.001)
    local = [builders.write_manifest(tmp_path / name, ROWS) for name in ("m.parquet", "m.jsonl")]
    (tmp_path / "bad.jsonl").write_text("{")
    task = {"utterance_id": "u0", "task": "asr", "variables": None, "target_lang": "en", "answer": "a"}
    builders.write_manifest(tmp_path / "i.jsonl", [task])
    with storage.s3_server(monkeypatch) as server:
        storage.upload(server, tmp_path, "bucket/corpora/one")
        for path in local:
            assert manifest.read_manifest(f"s3://bucket/corpora/one/{path.name}") == manifest.read_manifest(path)
        assert len(manifest.read_instructions("s3://bucket/corpora/one/i.jsonl")) == 1
        with pytest.raises(UserError, match=r"^s3://bucket/corpora/one/bad.jsonl, line 1: not JSON"):
            manifest.read_manifest("s3://bucket/corpora/one/bad.jsonl")
        with pytest.raises(UserError, match=r"^s3://m.jsonl names no file in a bucket"):
            manifest.read_manifest("s3://m.jsonl")
        for absent in ("s3://bucket/corpora/one/m.csv", "s3://nobucket/m.jsonl"):
            with pytest.raises(UserError, match=f"^file {absent} does not exist$"):
                manifest.read_manifest(absent)


def test_relative_audio_starts_where_the_manifest_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert manifest.root_of("corpus/m.jsonl") == str(tmp_path / "corpus")
    assert manifest.root_of(tmp_path / "m.jsonl") == str(tmp_path)
    assert manifest.root_of("s3://bucket/corpora/one/m.jsonl") == "s3://bucket/corpora/one"
    assert manifest.root_of("s3://bucket/m.jsonl") == "s3://bucket"


def test_a_file_address_is_refused_with_the_path_to_give() -> None:
    with pytest.raises(UserError, match=r"^file:///a/m.jsonl: a file on a disk is named by its path, as /a/m.jsonl$"):
        manifest.read_manifest("file:///a/m.jsonl")
