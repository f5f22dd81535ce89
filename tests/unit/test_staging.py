"""Copies of checkpoints on a node's own disk."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from sm_train import files
from sm_train.errors import UserError
from sm_train.models import checkpoints, staging
from sm_train.models.llm import FrozenLlm, LlmConfig
from sm_train.models.staging import MARKER, stage
from tests import builders


@pytest.fixture
def llm(llm_folder: Path, tmp_path: Path) -> Path:
    """An LLM with files that nobody loads."""
    folder = tmp_path / "shared/llm"
    shutil.copytree(llm_folder, folder)
    (folder / "consolidated.safetensors").write_bytes(b"not listed")
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    builders.save_weights(folder, dict.fromkeys(["a.weight", "b.weight"], torch.ones(1000, 30)), sharded=True)
    (folder / "model.safetensors").unlink()
    return folder


def test_what_a_model_is_made_from_is_copied_once(
    llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    local = tmp_path / "scratch/me"
    copy = stage(llm, str(local))
    assert copy.parent == local
    assert "0.00 GB are copied there" in capsys.readouterr().out
    names = {path.name for path in llm.iterdir()} - {"consolidated.safetensors", "pytorch_model.bin"}
    assert {path.name for path in copy.iterdir()} == names | {MARKER}
    assert all((copy / name).read_bytes() == (llm / name).read_bytes() for name in names)
    monkeypatch.setattr(staging, "_copy", lambda *what: pytest.fail("it is there"))
    for fresh_s in (600.0, 0.0):
        monkeypatch.setattr(staging, "_FRESH_S", fresh_s)
        assert stage(llm, str(local)) == copy
    assert stage(llm, None) == stage(llm, "") == llm
    assert capsys.readouterr().out == ""


def test_a_model_is_the_same_from_its_copy_and_keeps_its_name(llm_folder: Path, tmp_path: Path) -> None:
    cfg = LlmConfig(str(llm_folder), device="cpu")
    plain = FrozenLlm(cfg)
    near = FrozenLlm(LlmConfig(str(llm_folder), device="cpu", stage_to=str(tmp_path)))
    assert (near.path, near.fingerprint) == (plain.path, plain.fingerprint)
    assert str(near.model.name_or_path).startswith(str(tmp_path))
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(near.model.state_dict()[name], tensor)


@pytest.mark.parametrize("how", ["cut", "changed", "gone"])
def test_a_damaged_copy_is_made_anew(
    llm: Path, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = stage(llm, str(tmp_path / "scratch"))
    path = copy / "model-00002-of-00002.safetensors"
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if how == "cut" else data[:-1] + b"\7")
    os.utime(copy / MARKER, (1.0, 1.0))
    assert stage(llm, str(tmp_path / "scratch")) == copy
    assert "is not as it was copied" in capsys.readouterr().out
    assert path.read_bytes() == data


def test_another_content_is_another_copy(llm: Path, tmp_path: Path) -> None:
    copies = [stage(llm, str(tmp_path / "scratch"))]
    (llm / "chat_template.jinja").write_text("{{ messages }}")
    copies.append(stage(llm, str(tmp_path / "scratch")))
    builders.save_weights(llm, dict.fromkeys(["a.weight", "b.weight"], torch.zeros(1000, 30)), sharded=True)
    copies.append(stage(llm, str(tmp_path / "scratch")))
    assert len(set(copies)) == 3


def test_a_disk_that_is_too_small_or_fills_up_is_one_line(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, real = tmp_path / "scratch", shutil.disk_usage
    left_out = ("consolidated.safetensors", "pytorch_model.bin")
    needed = sum(path.stat().st_size for path in llm.iterdir() if path.name not in left_out)
    said = re.escape(f"stage_to {root}: {llm} needs {needed} bytes there, ")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=77))
        with pytest.raises(UserError, match=f"{said}77 are free; name a larger disk"):
            stage(llm, str(root))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        with pytest.raises(UserError, match=said):
            stage(llm, str(root))
    assert [path.suffix for path in root.iterdir()] == [".lock"]
    assert (stage(llm, str(root)) / MARKER).is_file()


def test_a_copy_that_is_not_what_was_read_is_not_used(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "file_digest", lambda path: "0" * 16)
    with pytest.raises(UserError, match=r"is not what was read from .*; the disk or the network damages data"):
        stage(llm, str(tmp_path / "scratch"))
    assert [path.suffix for path in (tmp_path / "scratch").iterdir()] == [".lock"]


def _rank(llm: Path, to: Path, copies: Path) -> None:
    real = staging._copy

    def counted(*what: object) -> None:
        copies.open("a").write("x")
        real(*what)  # type: ignore[arg-type]

    staging._copy = counted
    files.write_json(to.with_name(f"rank-{os.getpid()}.json"), str(stage(llm, str(to))))


def test_of_the_ranks_of_a_node_one_copies(llm: Path, tmp_path: Path) -> None:
    forks = multiprocessing.get_context("fork")
    ranks = [forks.Process(target=_rank, args=(llm, tmp_path / "scratch", tmp_path / "copies")) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0] * 4
    assert (tmp_path / "copies").read_text() == "x"
    found = {json.loads(path.read_text()) for path in tmp_path.glob("rank-*.json")}
    assert found == {str(stage(llm, str(tmp_path / "scratch")))}
    assert checkpoints.weight_map(Path(found.pop())).keys() == {"a.weight", "b.weight"}


@pytest.mark.parametrize("marker", ["", "not JSON"])
def test_a_copy_whose_marker_is_damaged_is_made_anew(llm: Path, tmp_path: Path, marker: str) -> None:
    copy = stage(llm, str(tmp_path / "scratch"))
    (copy / MARKER).write_text(marker)
    assert stage(llm, str(tmp_path / "scratch")) == copy
    assert json.loads((copy / MARKER).read_text())


def test_weights_that_were_written_again_are_another_copy(llm: Path, tmp_path: Path) -> None:
    copy = stage(llm, str(tmp_path / "scratch"))
    os.utime(llm / "model-00002-of-00002.safetensors", (1.0, 1.0))
    assert stage(llm, str(tmp_path / "scratch")) != copy


def test_a_file_is_no_place_for_copies(llm: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").write_text("")
    with pytest.raises(UserError, match="is a file; name a folder"):
        stage(llm, str(tmp_path / "scratch"))
