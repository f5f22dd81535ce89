"""The protocol with COMET's environment. COMET itself is not run here: a module with its interface (unbabel-comet
2.2.7) stands in for it, in a process of the real interpreter, and scores by the share of equal words."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from sm_train.errors import UserError
from sm_train.scoring.scores import Hypothesis, read_results, write_hypotheses
from tools.comet import main

STAND_IN = """
import pathlib

def download_model(model):
    print("what a library prints on stdout is no harm")
    assert model == "Org/model", model
    return pathlib.Path(__file__).parent / "model.ckpt"

def load_from_checkpoint(path):
    if "missing" in str(path):
        raise Exception(f"Invalid checkpoint path: {path}")
    assert pathlib.Path(path).read_bytes() == b"weights"
    return Model()

class Prediction(dict):
    __getattr__ = dict.__getitem__

class Model:
    def predict(self, samples, batch_size=16, gpus=1, progress_bar=True):
        assert (batch_size, gpus) == (2, 0)
        with open(pathlib.Path(__file__).parent / "asked", "a") as file:
            file.writelines(f"{s['src']} | {s['mt']} | {s['ref']}\\n" for s in samples)
        pairs = [(set(s["mt"].split()), set(s["ref"].split())) for s in samples]
        return Prediction(scores=[len(a & b) / len(b) for a, b in pairs])
"""


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a module named comet, of a distribution named unbabel-comet, and of a checkpoint."""
    place = tmp_path / "packages"
    (place / "comet").mkdir(parents=True)
    (place / "comet/__init__.py").write_text(STAND_IN)
    (place / "comet/model.ckpt").write_bytes(b"weights")
    (place / "unbabel_comet-9.9.dist-info").mkdir()
    (place / "unbabel_comet-9.9.dist-info/METADATA").write_text("Name: unbabel-comet\nVersion: 9.9\n")
    monkeypatch.setenv("PYTHONPATH", str(place))
    return place


def evaluated(folder: Path, told: Sequence[str]) -> Path:
    """Hypotheses of one system about some utterances, into French, and their transcripts."""
    rows = [Hypothesis("s", "asr", "en", "test", n, f"u{n}", "p", f"words {n}", "x") for n in range(len(told))]
    rows += [
        Hypothesis("s", "st", "fr", "test", n, f"u{n}", "p", "un deux trois quatre", text)
        for n, text in enumerate(told)
    ]
    write_hypotheses(folder / "hypotheses.jsonl", rows)
    return folder / "hypotheses.jsonl"


def words(path: Path, model: object = "Org/model") -> list[str]:
    return [str(path), "--python", sys.executable, "--model", str(model), "--batch-size", "2"]


def test_scores_come_back_in_order_as_results(tmp_path: Path, environment: Path) -> None:
    path = evaluated(tmp_path, ["un deux trois quatre", "un deux", "", 'rien "à" dire'])
    before = path.read_bytes()
    main(words(path))
    (result,) = read_results(tmp_path / "comet.json")
    assert (result.metric, result.task, result.count) == ("COMET", "st-fr", 4)
    assert result.value == pytest.approx(100 * (1 + 0.5) / 4)
    assert result.low < result.value < result.high
    # b"weights" as sha256sum has it, so that a result names its checkpoint
    assert "COMET|Org/model|hash:9a129038d9a00aed|unbabel-comet:9.9|" in result.signature
    asked = (environment / "comet/asked").read_text(encoding="utf-8").splitlines()
    assert asked[1] == "words 1 | un deux | un deux trois quatre"
    assert path.read_bytes() == before


def test_equal_segments_are_scored_once_and_a_folder_is_a_model(tmp_path: Path, environment: Path) -> None:
    (tmp_path / "model/checkpoints").mkdir(parents=True)
    (environment / "comet/model.ckpt").rename(tmp_path / "model/checkpoints/model.ckpt")
    path = evaluated(tmp_path, ["un deux", "un"])
    doubled = path.read_text(encoding="utf-8")
    path.write_text(doubled + doubled.replace('"system": "s"', '"system": "t"'), encoding="utf-8")
    main(words(path, tmp_path / "model"))
    assert [(r.system, r.value) for r in read_results(tmp_path / "comet.json")] == [("s", 37.5), ("t", 37.5)]
    assert len((environment / "comet/asked").read_text(encoding="utf-8").splitlines()) == 2


def test_mistakes_are_one_line(tmp_path: Path, environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = evaluated(tmp_path, ["un"])
    (tmp_path / "missing/checkpoints").mkdir(parents=True)
    (tmp_path / "missing/checkpoints/model.ckpt").touch()
    with pytest.raises(UserError, match=r"COMET .*missing failed under .*: Exception: Invalid checkpoint path"):
        main(words(path, tmp_path / "missing"))
    with pytest.raises(UserError, match=r"--python ./nowhere cannot be run .*; make it: python -m venv comet-env"):
        main([str(path), "--python", "./nowhere"])
    monkeypatch.delenv("PYTHONPATH")
    with pytest.raises(UserError, match=r"has no COMET; make it: python -m venv comet-env && comet-env/bin/pip"):
        main(words(path))
    assert not (tmp_path / "comet.json").exists()


def test_a_process_that_dies_is_one_line(tmp_path: Path, environment: Path) -> None:
    (environment / "comet/__init__.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    with pytest.raises(UserError, match="ended with code -9"):
        main(words(evaluated(tmp_path, ["un"])))


def test_a_translation_without_its_transcript_is_one_line(tmp_path: Path, environment: Path) -> None:
    path = tmp_path / "hypotheses.jsonl"
    write_hypotheses(path, [Hypothesis("s", "st", "fr", "test", 0, "u0", "p", "un", "un")])
    with pytest.raises(UserError, match="u0: its transcript, COMET's source, is not among the hypotheses"):
        main(words(path))
    write_hypotheses(path, [Hypothesis("s", "asr", "en", "test", 0, "u0", "p", "one", "one")])
    with pytest.raises(UserError, match="holds no translation"):
        main(words(path))
