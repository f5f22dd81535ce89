"""The command that scores hypotheses anew: from the file alone, by words of its own, and its mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sm_train import files, report
from sm_train.data.mds import file_digest
from sm_train.errors import UserError
from sm_train.prompts import LANGUAGES
from sm_train.scoring.language import open_languages
from sm_train.scoring.scores import Hypothesis, score, write_hypotheses, write_results

HYPOTHESES = [
    Hypothesis("topline", "asr", "en", "test", 0, "t-0", "Say. {speech}", "A red cat.", "a red cat"),
    Hypothesis("topline", "st", "fr", "test", 0, "t-0", "In French. {speech}", "un chat rouge", "le chat rouge"),
    Hypothesis("topline", "asr", "en", "test", 0, "t-0", "Write. {speech}", "A red cat.", "a bed cat", "held_out"),
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_hypotheses(tmp_path / "run" / "hypotheses.jsonl", HYPOTHESES)
    return tmp_path / "run" / "hypotheses.jsonl"


def expected(folder: Path, normaliser: str, lexicon: str | None = None) -> bytes:
    write_results(folder / "expected.json", score(HYPOTHESES, normaliser, open_languages(lexicon, ["fr"], LANGUAGES)))
    return (folder / "expected.json").read_bytes()


def test_hypotheses_alone_are_enough(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.main(["--from-hyps", str(source)])
    assert (source.parent / "results.json").read_bytes() == expected(tmp_path, "mms")
    assert re.search(r"topline +test +held_out +33\.3", capsys.readouterr().out)
    assert "A red cat." in (source.parent / "report.html").read_text()


def test_words_of_its_own_and_another_folder(source: Path, tmp_path: Path) -> None:
    (tmp_path / "words.json").write_text(json.dumps({"fr": ["chat", "rouge"], "en": ["cat"]}))
    argv = ["--from-hyps", str(source), "--to", str(tmp_path / "to"), "--normaliser", "none"]
    report.main([*argv, "--lexicon", str(tmp_path / "words.json")])
    assert (tmp_path / "to/results.json").read_bytes() == expected(tmp_path, "none", str(tmp_path / "words.json"))
    assert (tmp_path / "to/hypotheses.jsonl").read_bytes() == source.read_bytes()
    assert {path.name for path in source.parent.iterdir()} == {"hypotheses.jsonl"}


def test_a_mistake_is_one_line(source: Path, tmp_path: Path) -> None:
    def mistaken(match: str, *argv: str) -> None:
        with pytest.raises(UserError, match=match) as caught:
            report.main(["--from-hyps", *argv])
        assert "\n" not in str(caught.value)

    mistaken("nowhere: no readable hypotheses", str(tmp_path / "nowhere"))
    mistaken("unknown normaliser 'whisper'", str(source), "--normaliser", "whisper")
    (tmp_path / "empty.jsonl").write_text("")
    mistaken("holds no hypotheses", str(tmp_path / "empty.jsonl"))
    lexicon = tmp_path / "words.json"
    lexicon.write_text(json.dumps({"fr": ["chat"]}))
    asked = {"settings": {"lexicon": str(lexicon)}, "lexicon": file_digest(lexicon)}
    files.write_json(source.parent / "evaluation.json", asked)
    lexicon.write_text(json.dumps({"fr": ["chien"]}))
    mistaken(r"words\.json is not there as the evaluation read it; name that file with --lexicon", str(source))
    assert not (source.parent / "results.json").exists()
