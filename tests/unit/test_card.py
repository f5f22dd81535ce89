"""The model card: what a run says of itself, and what licences mean."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from sm_train import config, files
from sm_train.data import shards
from sm_train.data.mixing import Sources
from sm_train.exported import SpeechLlmConfig, card
from sm_train.scoring import mappers
from tests.exporting import exported, run, run_folder  # noqa: F401


def head(text: str) -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load(text.split("---")[1])
    return found


def test_a_card_is_filled_from_its_run(exported: Path, run: Path, shard_set: Path) -> None:  # noqa: F811
    text = (exported / "README.md").read_text()
    assert head(text)["language"] == ["en"]
    assert "base_model" not in head(text)  # folders of this machine are no repositories
    table = shards.read_table(shard_set, "utterances.parquet").to_pylist()
    trained_on = [row["duration_s"] for row in table if row["split"] == "train"]
    assert f"{sum(trained_on) / 3600:.2f} h of speech, {len(trained_on)} utterances, splits train" in text
    assert "stage 1, step 3" in text
    assert "loss 0.5, valid_wer 0.9" in text  # not of step 4, which the checkpoint has not seen
    assert config.fingerprint(config.read_yaml(run / "config.yaml")) in text
    assert "Not evaluated" in text
    assert str(exported.parent) not in text


def seen_of(run: Path, shard_set: Path, evaluated: Path) -> card.Seen:  # noqa: F811
    trained = mappers.read(run, run / "checkpoints" / "step-3")
    return card.read(trained, Sources(str(shard_set), "tiny"), evaluated)


def test_scores_are_those_of_these_very_weights(
    run: Path, shard_set: Path, tmp_path: Path, exported: Path  # noqa: F811
) -> None:  # fmt: skip
    digests = mappers.read(run, run / "checkpoints" / "step-3").digests()
    assert set(digests) == {"config.json", "mapper.safetensors"}
    figures = {"task": "asr", "metric": "WER", "value": 12.5, "low": 10, "high": 15, "count": 8, "split": "dev"}
    systems = ("topline", "stage 1 (one)", "stage 1 (two)", "stage 1 (one), no LLM")
    (tmp_path / "results.json").write_text(
        json.dumps([{"system": system, **figures, "signature": ""} for system in systems])
    )
    files.write_json(tmp_path / "evaluation.json", {"mappers": {"stage 1 (two)": {}, "stage 1 (one)": digests}})
    seen = seen_of(run, shard_set, tmp_path)
    assert [row.system for row in seen.results] == ["topline", "stage 1 (one)", "stage 1 (one), no LLM"]
    said = SpeechLlmConfig.from_pretrained(exported)
    assert "| stage 1 (one) | dev, asr | WER | 12.5 | 10 to 15 | 8 |" in card.write("x", said, seen, None)
    files.write_json(tmp_path / "evaluation.json", {"mappers": {"stage 1 (one)": {}}})
    assert seen_of(run, shard_set, tmp_path).results == ()


@pytest.mark.parametrize(
    ("encoder", "licence", "wanted", "line"),
    [
        ("facebook/seamless-m4t-v2-large", None, "cc-by-nc-4.0", "is for non-commercial use"),
        ("facebook/w2v-bert-2.0", None, "mit", "have the licence mit"),
        ("someone/else", None, "other", "look it up before you share this folder"),
        ("someone/else", "apache-2.0", "apache-2.0", "Stated for this folder: apache-2.0"),
    ],
)
def test_the_encoders_licence_is_said(
    run: Path, shard_set: Path, exported: Path, encoder: str, licence: str | None, wanted: str, line: str  # noqa: F811
) -> None:  # fmt: skip
    seen = seen_of(run, shard_set, run)
    names = {"encoder": encoder, "llm": "meta-llama/Llama-3.1-8B-Instruct", "tasks": {"asr": 1.0, "st-fr": 0.5}}
    of_hub = replace(seen, trained=replace(seen.trained, contract={**seen.trained.contract, **names}))
    text = card.write("x", SpeechLlmConfig.from_pretrained(exported), of_hub, licence)
    assert head(text)["license"] == wanted
    assert head(text)["base_model"] == ["meta-llama/Llama-3.1-8B-Instruct", encoder]
    assert line in text
    assert "asr 1, st-fr 0.5" in text


def test_a_tuned_runs_languages_are_those_of_its_answers_too(shard_set: Path, tmp_path: Path) -> None:
    tuned = run_folder(tmp_path / "tuned", shard_set, tuned=True)
    assert seen_of(tuned, shard_set, tuned).languages == ("en", "fr")
