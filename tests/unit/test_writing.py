"""Exported folders: what is in them, whole or absent, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sm_train import ask, files
from sm_train.data.target_set import TargetSet
from sm_train.errors import UserError
from sm_train.exported import SpeechLlm, card
from sm_train.exported.settings import open_folder
from sm_train.exported.writing import ExportConfig, export
from sm_train.models import adapter
from sm_train.models.llm import load_model
from sm_train.models.mapper import SpeechMapper
from tests.exporting import exported, recordings, run, run_folder  # noqa: F401
from tests.unit.test_adapter import random_adapter
from tests.unit.test_adapter import save as save_adapter


def test_the_folder_holds_what_answers_need(exported: Path, shard_set: Path) -> None:  # noqa: F811
    names = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
    assert names == {
        "README.md", "config.json", "generation_config.json", "preprocessor_config.json", "targets.safetensors",
        "tokenizer.json", "tokenizer_config.json", "mapper/config.json", "mapper/mapper.safetensors",
        "mapper/state.json",
    }  # fmt: skip
    SpeechMapper.from_pretrained(exported / "mapper")
    targets, stored = TargetSet(shard_set, "tiny"), load_file(exported / "targets.safetensors")
    assert torch.equal(stored["rows"], targets.rows_RD)
    assert stored["rows"].dtype == targets.rows_RD.dtype
    assert files.read_json(exported / "config.json")["targets"]["pad_id"] == targets.contract["pad_id"]
    assert not list(exported.parent.glob(files.ASIDE + "*"))
    assert (exported / "targets.safetensors").stat().st_mode & 0o044


def test_a_tuned_mapper_is_exported_as_it_is_heard(tmp_path: Path, shard_set: Path) -> None:
    tuned = run_folder(tmp_path / "tuned", shard_set, tuned=True)
    folder = export(ExportConfig(str(tuned), str(tmp_path / "out"), trim="change_point"))
    said = files.read_json(folder / "config.json")
    assert (said["trim"], said["system"]) == ("none", "stage 2 ASR/ST-FR-CE")
    model = SpeechLlm.from_pretrained(folder, device="cpu")
    state = files.read_json(folder / "mapper" / "state.json")
    state["contract"]["rendered.Say.\n{speech}"] = [[1], [2]]
    files.write_json(folder / "mapper" / "state.json", state)
    with pytest.raises(UserError, match="renders the prompt"):
        SpeechLlm.from_pretrained(folder, device="cpu")
    assert model.generation_config.max_new_tokens == 150


def test_with_its_models_a_folder_answers_on_its_own(
    run: Path, model_copies: tuple[Path, Path], tmp_path: Path, manifest: Path  # noqa: F811
) -> None:  # fmt: skip
    encoder, llm = model_copies
    (tmp_path / "first").mkdir()
    keys = {"speech_encoder": str(encoder), "llm": str(llm), "max_new_tokens": 4}
    folder = export(ExportConfig(str(run), str(tmp_path / "first" / "out"), with_models=True, **keys))
    there = export(ExportConfig(str(run), str(tmp_path / "there"), **keys))
    recording = recordings(manifest)[0]
    said = SpeechLlm.from_pretrained(there, device="cpu").generate(recording, "What is said?")
    shutil.rmtree(encoder)
    shutil.rmtree(llm)
    with pytest.raises(UserError, match="the folder does not exist"):
        SpeechLlm.from_pretrained(there, device="cpu")
    moved = folder.rename(tmp_path / "moved")
    assert SpeechLlm.from_pretrained(moved, device="cpu").generate(recording, "What is said?") == said
    of_there = SpeechLlm.from_pretrained(
        there, device="cpu", llm=str(moved / "llm"), speech_encoder=str(moved / "encoder")
    )
    assert of_there.generate(recording, "What is said?") == said


@pytest.fixture
def model_copies(tmp_path: Path, encoder_folder: Path, llm_folder: Path) -> tuple[Path, Path]:
    shutil.copytree(encoder_folder, tmp_path / "models" / "encoder")
    shutil.copytree(llm_folder, tmp_path / "models" / "llm")
    return tmp_path / "models" / "encoder", tmp_path / "models" / "llm"


def test_what_stands_there_is_not_written_over(run: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already; remove it, or name another folder with --to"):
        export(ExportConfig(str(run), str(tmp_path / "out")))


def test_an_export_that_fails_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    def fail(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(card, "write", fail)
    with pytest.raises(OSError, match="No space left"):
        export(ExportConfig(str(run), str(tmp_path / "out")))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_on_its_own_needs_to_be_told_its_data(
    run: Path, tmp_path: Path, shard_set: Path, exported: Path  # noqa: F811
) -> None:  # fmt: skip
    copy = Path(shutil.copytree(run / "checkpoints" / "step-3", tmp_path / "copy"))
    with pytest.raises(UserError, match=r"give shards=\.\.\. and target=\.\.\."):
        export(ExportConfig(str(copy), str(tmp_path / "out")))
    folder = export(ExportConfig(str(copy), str(tmp_path / "out"), shards=str(shard_set), target="tiny"))
    assert files.read_json(folder / "config.json")["trim"] == "none"  # as ask has it of a run that says nothing
    of_run = export(ExportConfig(str(run / "checkpoints" / "best"), str(tmp_path / "of_run"), max_new_tokens=8))
    wanted, found = (json.loads((one / "config.json").read_text()) for one in (exported, of_run))
    assert wanted == found


def test_other_models_than_the_runs_are_refused(
    run: Path, model_copies: tuple[Path, Path], tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    encoder, llm = model_copies
    weights = load_file(encoder / "model.safetensors")
    name = next(n for n in weights if "speech_encoder.encoder.layers.0" in n and n.endswith("weight"))
    from tests import builders

    builders.save_weights(encoder, {**weights, name: 2 * weights[name]}, sharded=False)
    with pytest.raises(UserError, match="not those that the features come from"):
        export(ExportConfig(str(run), str(tmp_path / "out"), speech_encoder=str(encoder)))
    tokenizer = json.loads((llm / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = tokenizer["added_tokens"][:-1]
    (llm / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="is not the one that the mapper was trained for"):
        export(ExportConfig(str(run), str(tmp_path / "out"), llm=str(llm)))


def test_an_adapter_goes_along_and_is_at_work(
    run: Path, llm_folder: Path, tmp_path: Path, manifest: Path  # noqa: F811
) -> None:  # fmt: skip
    joint = Path(shutil.copytree(run, tmp_path / "joint", symlinks=True))
    step = joint / "checkpoints" / "step-3"
    torch.manual_seed(5)
    save_adapter(step, random_adapter(load_model(str(llm_folder), None, "float32"), SpeechMapper.from_pretrained(step)))
    folder = export(ExportConfig(str(joint), str(tmp_path / "out"), max_new_tokens=8))
    assert {path.name for path in (folder / "mapper").glob("adapter*")} == {adapter.WEIGHTS, adapter.CONFIG}
    model = SpeechLlm.from_pretrained(folder, device="cpu")
    alone = SpeechLlm.from_pretrained(export(ExportConfig(str(run), str(tmp_path / "alone"), max_new_tokens=8)))
    recording = recordings(manifest)[0]
    said = model.generate(recording, "What is said?")
    assert said == ask.answer(joint, recording, "What is said?", 8)[1] != alone.generate(recording, "What is said?")
    data = bytearray((folder / "mapper" / adapter.WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / "mapper" / adapter.WEIGHTS).write_bytes(data)
    with pytest.raises(UserError, match="is not what was written"):
        SpeechLlm.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize("name", ["mapper/mapper.safetensors", "targets.safetensors"])
def test_a_damaged_folder_is_named(exported: Path, tmp_path: Path, name: str) -> None:  # noqa: F811
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    data = bytearray((copy / name).read_bytes())
    data[-1] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(UserError, match="is not what was written"):
        SpeechLlm.from_pretrained(copy, device="cpu")


def test_a_folder_of_something_else_is_named(llm_folder: Path) -> None:
    with pytest.raises(UserError, match="holds no exported model: its model_type is 'llama'"):
        open_folder(llm_folder)
