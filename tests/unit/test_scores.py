"""Scores against values worked out by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from sm_train.errors import UserError
from sm_train.scoring.language import Lexicon
from sm_train.scoring.scores import (
    Hypothesis,
    Result,
    read_hypotheses,
    read_results,
    score,
    write_hypotheses,
    write_results,
)
from sm_train.scoring.table import table


def _said(task: str, reference: str, hypothesis: str, number: int = 0, **changes: str) -> Hypothesis:
    names = {"system": "stage 1", "target_lang": "en", "split": "test", "prompt": "{speech}", **changes}
    return Hypothesis(
        task=task,
        ordinal=number,
        id=f"{names['split']}-{number:06d}",
        reference=reference,
        hypothesis=hypothesis,
        **names,
    )


def _values(results: list[Result]) -> dict[str, float]:
    return {result.metric: result.value for result in results}


ASR = [
    _said("asr", "The cat sat down.", "the cat sat down", 0),  # 0 of 4 words, 0 of 16 characters
    _said("asr", "a red dog", "a bed dog runs", 1),  # 1 substitution + 1 insertion of 3; 1 + 5 of 9
    _said("asr", "it is", "it", 2),  # 1 deletion of 2; 3 of 5
]


def test_asr_by_hand() -> None:
    values = _values(score(ASR, "mms"))
    assert values["WER"] == pytest.approx(100 * 3 / 9)
    assert values["CER"] == pytest.approx(100 * 9 / 30)
    assert values["exact"] == pytest.approx(1 / 3)


def test_the_normaliser_counts_and_is_named() -> None:
    plain = score(ASR[:1], "none")
    assert _values(plain)["WER"] == pytest.approx(50.0)  # "The" and "down." differ
    assert all("normaliser:none" in result.signature for result in plain)
    assert "jiwer:4" in plain[0].signature
    with pytest.raises(UserError, match="unknown normaliser"):
        score(ASR, "whisper")


def test_an_empty_hypothesis_is_all_deletions() -> None:
    assert _values(score([_said("asr", "one two three", "")], "mms")) == {"WER": 100.0, "CER": 100.0, "exact": 0.0}
    assert _values(score([_said("st", "un deux", "", target_lang="fr")], "mms")) == {"BLEU": 0, "chrF": 0, "exact": 0}
    assert _values(score([_said("sqa", "a cat", "")], "mms")) == {"accuracy": 0.0}


@pytest.mark.parametrize("reference", ["", "  ", "?!"])
@pytest.mark.parametrize("task", ["asr", "st", "sqa"])
def test_an_empty_reference_names_the_id(task: str, reference: str) -> None:
    with pytest.raises(UserError, match="test-000017"):
        score([_said(task, reference, "words", 17)], "mms")


def test_translation_is_sacrebleu_on_the_texts_as_they_are() -> None:
    pairs = [
        ("Le chat noir dort ici.", "Le chat blanc dort ici."),
        ("Il mange du pain.", "Il mange du pain."),
        ("Oui", ""),
    ]
    items = [_said("st", r, h, n, target_lang="fr") for n, (r, h) in enumerate(pairs)]
    results = score(items, "mms")
    references, hypotheses = [r for r, _ in pairs], [h for _, h in pairs]
    values = _values(results)
    assert values["BLEU"] == pytest.approx(BLEU().corpus_score(hypotheses, [references]).score)
    assert values["chrF"] == pytest.approx(CHRF().corpus_score(hypotheses, [references]).score)
    assert values["exact"] == pytest.approx(1 / 3)
    assert {result.task for result in results} == {"st-fr"}
    assert results[0].signature.startswith("BLEU|nrefs:1|")
    assert "tok:13a" in results[0].signature
    assert results[1].signature.startswith("chrF|nrefs:1|")
    assert "nc:6" in results[1].signature


LANGUAGES = Lexicon({"fr": ["le", "chat", "a"], "de": ["die", "Katze"], "en": ["the", "cat", "a"]})


def test_answers_in_the_language_asked_for() -> None:
    said = ["le chat", "the cat", "a", "", "der Hund", "chat chat cat"]
    items = [_said("st", "le chat dort", text, n, target_lang="fr") for n, text in enumerate(said)]
    items += [_said("st", "die Katze", "le chat", n, target_lang="de") for n in range(2)]
    results = score([*items, *ASR], "mms", LANGUAGES)
    (french, german) = (result for result in results if result.metric == "in language")
    assert (french.task, french.value, french.count) == ("st-fr", pytest.approx(3 / 6), 6)  # le chat, a, chat chat cat
    assert french.low < french.value < french.high
    assert (german.task, german.value, german.low, german.high) == ("st-de", 0.0, 0.0, 0.0)
    assert LANGUAGES.signature in french.signature
    assert [r.metric for r in results if r.task == "st-fr"] == ["BLEU", "chrF", "in language", "exact"]


def test_answers_match_without_a_leading_article() -> None:
    pairs = [("the market", "Market."), ("Paul", "the Paul"), ("two cats", "two the cats"), ("A", "a"), ("the", "a")]
    results = score([_said("sqa", r, h, n) for n, (r, h) in enumerate(pairs)], "mms")
    assert _values(results) == {"accuracy": pytest.approx(3 / 5)}
    assert "without a leading a, an or the" in results[0].signature


def test_intervals_bracket_the_value_and_repeat() -> None:
    items = [_said("asr", "one two three four", "one two three four" if n % 4 else "one two", n) for n in range(80)]
    items += [_said("st", f"le chat numéro {n} dort", f"le chat {n % 7} dort", n, target_lang="fr") for n in range(80)]
    results = score(items, "mms")
    assert results == score(items, "mms")
    for result in results:
        assert result.low <= result.value <= result.high
        assert result.count == 80
    by_name = {result.metric: result for result in results if result.task == "asr"}
    # WER is half the share p = 1/4 of short answers: +- 1.96 sqrt(p (1-p) / 80) / 2 = 4.7 points around 12.5.
    assert by_name["WER"].low == pytest.approx(12.5 - 4.7, abs=1.0)
    assert by_name["WER"].high == pytest.approx(12.5 + 4.7, abs=1.0)


def test_an_utterance_asked_often_is_drawn_as_one() -> None:
    def width(per_utterance: int) -> float:
        items = [
            _said("sqa", "yes", "yes" if n % 2 else "no", n, prompt=f"{{speech}} {k}")
            for n in range(20)
            for k in range(per_utterance)
        ]
        (result,) = score(items, "mms")
        assert result.count == 20 * per_utterance
        return result.high - result.low

    assert width(1) == pytest.approx(width(5))


def test_groups_keep_their_order_and_table_shows_them() -> None:
    items = [
        _said("asr", "a b c", "a b c", system="topline", split="test"),
        _said("st", "oui", "oui", target_lang="fr", system="topline"),
        _said("st", "ja", "nein", target_lang="de", system="topline"),
        _said("sqa", "red", "red", system="topline"),
        _said("asr", "a b c", "a x c", system="stage 1", split="test_voices"),
    ]
    lines = table(score(items, "mms")).splitlines()
    titles = ["system", "split", "ASR WER", "fr chrF", "de chrF", "fr BLEU", "de BLEU", "SQA accuracy"]
    assert re.split(r" {2,}", lines[0]) == titles
    assert lines[1].split()[:4] == ["topline", "test", "0.0", "100.0"]
    assert lines[1].split()[-1] == "1.00"
    assert lines[2].split() == ["stage", "1", "test_voices", "33.3", "-", "-", "-", "-", "-"]
    assert table([]) == "system  split"
    told = table(score(items, "mms", LANGUAGES)).splitlines()
    titles[5:5] = ["fr in language", "de in language"]
    assert re.split(r" {2,}", told[0]) == titles
    assert told[1].split()[4:8] == ["0.0", "0.00", "0.00", "0.0"]  # de chrF, both shares, fr BLEU


def test_groups_of_prompts_are_scored_apart_and_named() -> None:
    items = [_said("asr", "a b", "a b"), _said("asr", "a b", "a x", group="held_out")]
    trained, held_out = (r for r in score(items, "mms") if r.metric == "WER")
    assert (trained.prompts, trained.value, trained.count) == ("train", 0, 1)
    assert (held_out.prompts, held_out.value, held_out.count) == ("held_out", 50, 1)
    lines = [re.split(r" {2,}", line) for line in table(score(items, "mms")).splitlines()]
    assert lines[0] == ["system", "split", "prompts", "ASR WER"]
    assert lines[1:] == [["stage 1", "test", "train", "0.0"], ["stage 1", "test", "held_out", "50.0"]]


def test_files_of_before_are_read() -> None:
    """Those of a version that asked with one group of prompts and did not write which."""
    said = ASR[0].to_dict()
    del said["group"]
    assert Hypothesis.from_dict(said) == ASR[0]
    result = score(ASR, "mms")[0]
    assert Result.from_dict({k: v for k, v in result.to_dict().items() if k != "prompts"}) == result


def test_files_round_trip(tmp_path: Path) -> None:
    odd = [*ASR, _said("asr", "one\u2028two\nthree", "é <b>", 9)]
    write_hypotheses(tmp_path / "hypotheses.jsonl", odd)
    assert read_hypotheses(tmp_path / "hypotheses.jsonl") == odd
    results = score(ASR, "mms")
    write_results(tmp_path / "results.json", results)
    assert read_results(tmp_path / "results.json") == results
    assert set(json.loads((tmp_path / "results.json").read_text())[0]) == {
        "system", "task", "metric", "value", "low", "high", "count", "split", "signature", "prompts"
    }  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hypotheses.jsonl", "results.json"]


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown task 'tts'"):
        score([_said("tts", "a", "b")], "mms")
    with pytest.raises(UserError, match="lacks value, low"):
        Result.from_dict({"system": "s", "task": "asr", "metric": "WER"})
    (tmp_path / "results.json").write_text('{"half": ')
    with pytest.raises(UserError, match=r"results\.json"):
        read_results(tmp_path / "results.json")
    with pytest.raises(UserError, match=r"hypotheses\.jsonl"):
        read_hypotheses(tmp_path / "hypotheses.jsonl")
