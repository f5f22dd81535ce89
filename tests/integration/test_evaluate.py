"""Evaluation and ask through the command line, on tiny random models: files, repetition, mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sm_train import ask, config, evaluate, files
from sm_train.data.target_set import TargetSet
from sm_train.errors import UserError
from sm_train.models.mapper import MapperConfig, SpeechMapper
from tests import builders

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, shard_set: Path, manifest: Path) -> Path:
    """A config of evaluation beside a run with one checkpoint of an untrained mapper."""
    folder = tmp_path_factory.mktemp("evaluate")
    targets = TargetSet(shard_set, "tiny")
    dataset = files.read_json(shard_set / "dataset.json")
    torch.manual_seed(0)
    width = dataset["width"]
    settings = MapperConfig(widths=[width, 16, 16], layers=1, heads=2, feed_forward=16)
    mapper = SpeechMapper(settings, width, targets.rows_RD.shape[1])
    step = folder / "run" / "checkpoints" / "step-1"
    step.mkdir(parents=True)
    save_file(dict(mapper.state_dict()), step / "mapper.safetensors")
    files.write_json(step / "config.json", mapper.description())
    frozen = {name: dataset[name] for name in ("encoder", "encoder_revision", "layer", "pool")}
    contract = {**frozen, "llm": targets.contract["llm"], "llm_revision": None}
    files.write_json(step / "state.json", {"global_step": 1, "contract": contract})
    (folder / "run" / "checkpoints" / "latest").symlink_to("step-1")
    run_config = {"shards": str(shard_set), "target": "tiny", "trim": "change_point"}
    (folder / "run" / "config.yaml").write_text(json.dumps(run_config))
    (folder / "prompts.yaml").write_text('asr:\n  train: ["Say.\\n{speech}"]\n')
    ids = [row["id"] for row in utterances(shard_set) if row["split"] == "dev"]
    tasks = [{"utterance_id": i, "task": "asr", "target_lang": "en", "answer": "the answer"} for i in ids]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    values = {
        "run": str(folder / "run"),
        "shards": str(shard_set),
        "target": "tiny",
        "splits": ["dev"],
        "instructions": str(folder / "tasks.jsonl"),
        "prompts": str(folder / "prompts.yaml"),
        "llm": {"path": targets.contract["llm"], "device": "cpu"},
        "audio_root": str(manifest.parent),
        "max_new_tokens": 4,
    }
    (folder / "config.yaml").write_text(json.dumps(values))
    return folder


def utterances(shard_set: Path) -> list[dict[str, object]]:
    from sm_train.data.shards import read_table

    rows: list[dict[str, object]] = read_table(shard_set, "utterances.parquet").to_pylist()
    return rows


def test_evaluation_writes_its_files_once(job: Path) -> None:
    first = builders.run_module("sm_train.evaluate", job / "config.yaml")
    assert first.returncode == 0, first.stderr
    results = files.read_json(job / "run" / "results.json")
    assert {r["system"] for r in results} == {"topline", "stage 1", "stage 1, no LLM"}
    hypotheses = (job / "run" / "hypotheses.jsonl").read_text().splitlines()
    assert len(hypotheses) == 3 * len((job / "tasks.jsonl").read_text().splitlines())
    page = (job / "run" / "report.html").read_text()
    assert "data:audio/" in page
    assert "<svg" in page
    stamp = (job / "run" / "results.json").stat().st_mtime_ns
    second = builders.run_module("sm_train.evaluate", job / "config.yaml")
    assert "evaluated already" in second.stdout
    assert (job / "run" / "results.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("checkpoint=nowhere", "has no checkpoint 'nowhere'"),
        ("splits=[moon]", "no utterance in split 'moon'"),
        ("llm.path=./nowhere", "the folder does not exist"),
        ("cascade=/nowhere", "set cascade: null"),
        ("instructions=/nowhere.parquet", "/nowhere.parquet does not exist"),
        ("prompt_group=held_out", "no held_out prompts for the task 'asr'"),
        ("trim=sometimes", "trim is 'sometimes'"),
    ],
)
def test_a_mistake_is_one_line(job: Path, override: str, line: str) -> None:
    with pytest.raises(UserError, match=re.escape(line)) as caught:
        evaluate.main([str(job / "config.yaml"), override])
    assert "\n" not in str(caught.value)


def test_ask_answers_about_a_recording(job: Path, manifest: Path) -> None:
    recording = sorted((manifest.parent / "audio").iterdir())[0]
    done = builders.run_module("sm_train.ask", job / "run", recording, "What is said?")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("heard:")
    assert "answer:" in done.stdout


def test_ask_refuses_what_is_no_recording(job: Path) -> None:
    with pytest.raises(UserError, match="undecodable"):
        ask.main([str(job / "run"), str(job / "tasks.jsonl"), "What is said?"])


@pytest.mark.parametrize("name", ["prompts.yaml", "tasks.jsonl"])
def test_what_changed_in_place_is_evaluated_anew(job: Path, name: str) -> None:
    cfg = config.load(evaluate.EvaluateConfig, [str(job / "config.yaml")], "sm_train.evaluate")
    step = job / "run" / "checkpoints" / "step-1"
    before, text = evaluate._described(cfg, step), (job / name).read_text()
    (job / name).write_text(text + "\n")
    assert evaluate._described(cfg, step) != before
    (job / name).write_text(text)
    assert evaluate._described(cfg, step) == before
