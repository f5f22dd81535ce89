from __future__ import annotations

import os
from pathlib import Path

import pytest

from sm_train import files
from sm_train.errors import UserError


def test_json_is_written_whole_and_equal_values_give_equal_bytes(tmp_path: Path) -> None:
    files.write_json(tmp_path / "deep" / "a.json", {"b": 1, "a": "é"})
    files.write_json(tmp_path / "b.json", {"a": "é", "b": 1})
    assert (tmp_path / "deep" / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert files.read_json(tmp_path / "b.json") == {"a": "é", "b": 1}


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a"
    files.write_text(path, "old")

    def fail(aside: Path) -> None:
        aside.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_whole(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_read_json_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        files.read_json(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        files.read_json(tmp_path / "bad.json")


def made(path: Path, text: str, marker: bool = True) -> Path:
    path.mkdir()
    (path / "data").write_text(text)
    if marker:
        (path / "DONE").write_text("")
    return path


def test_publish_puts_a_folder_in_its_place(tmp_path: Path) -> None:
    files.publish_folder(made(tmp_path / "aside", "new"), tmp_path / "part", "DONE")
    assert (tmp_path / "part" / "data").read_text() == "new"
    assert os.listdir(tmp_path) == ["part"]


def test_publish_leaves_the_whole_folder_of_a_faster_writer_alone(tmp_path: Path) -> None:
    part = made(tmp_path / "part", "first")
    files.publish_folder(made(tmp_path / "aside", "second"), part, "DONE")
    assert (part / "data").read_text() == "first"
    assert os.listdir(tmp_path) == ["part"]


def test_publish_replaces_a_folder_that_somebody_half_removed(tmp_path: Path) -> None:
    part = made(tmp_path / "part", "half", marker=False)
    files.publish_folder(made(tmp_path / "aside", "new"), part, "DONE")
    assert (part / "data").read_text() == "new"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"),
        ("[" * 200_000, "is not JSON"),
        ('{"a": ' + "9" * 10_000 + "}", "is not JSON"),
        ("[1]", "no JSON object"),
    ],
)
def test_what_is_no_json_object_is_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=f"a.json.*{says}"):
        files.read_object(tmp_path / "a.json")
    with pytest.raises(UserError, match=f"s3://b/a.json.*{says}"):
        files.parse_object(text.encode(), "s3://b/a.json")
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert files.read_object(tmp_path / "a.json") == files.parse_object(b'{"a": 1}', "") == {"a": 1}
