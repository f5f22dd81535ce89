"""Wordings and answered tasks, by hand, against scores.py, and on the miniature's own sentences."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sm_train.errors import UserError
from sm_train.scoring.robustness import NONE, Robustness, answered_tasks, confusion, robustness, table, write
from sm_train.scoring.scores import Hypothesis, normal_pair, score
from tools.miniature.world import World, WorldConfig


def said(task: str, id: str, reference: str, hypothesis: str, prompt: str = "p", lang: str = "en") -> Hypothesis:
    return Hypothesis("stage 1", task, lang, "test", 0, id, prompt, reference, hypothesis)


ASR = [
    said("asr", "u0", "a red boat runs", "a red boat runs", "p"),
    said("asr", "u1", "two birds", "two birds", "p"),
    said("asr", "u0", "a red boat runs", "a red goat ran", "q"),
    said("asr", "u1", "two birds", "two", "q"),
    said("asr", "u0", "a red boat runs", "the red boat runs", "r"),
    said("asr", "u1", "two birds", "two birds", "r"),
]


def answered(hypotheses: list[Hypothesis]) -> list[str | None]:
    return answered_tasks(hypotheses, [normal_pair(item, "mms") for item in hypotheses])


def test_wordings_by_hand() -> None:
    (entry,) = robustness(ASR, "mms")
    wers = {"p": 0.0, "q": 100 * 3 / 6, "r": 100 * 1 / 6}
    assert entry.by_prompt == pytest.approx(wers)
    assert entry.mean == pytest.approx(200 / 9)
    assert entry.spread == pytest.approx(np.std(list(wers.values()), ddof=1))
    assert (entry.worst, entry.worst_prompt) == (pytest.approx(50.0), "q")
    assert (entry.metric, entry.count, entry.paired) == ("WER", 6, True)
    assert entry.mean_low <= entry.mean <= entry.mean_high
    # Of two utterances a draw holds both, or one twice: 2 of 4, or 1 of 2 words wrong under q.
    assert (entry.worst_low, entry.worst_high) == (pytest.approx(50.0), pytest.approx(50.0))


@pytest.mark.parametrize(("task", "metric"), [("asr", "WER"), ("st", "chrF"), ("sqa", "accuracy")])
def test_a_single_wording_has_the_value_and_interval_of_results(task: str, metric: str) -> None:
    texts = ["le bateau rouge", "deux oiseaux", "une pierre", "la maison", "le vieux port", "un mot"]
    told = ["le bateau rouge", "deux oiseau", "une pierre", "maison", "le vieux", "rien"]
    items = [said(task, f"u{n}", *pair, lang="fr") for n, pair in enumerate(zip(texts, told, strict=True))]
    (entry,) = robustness(items, "mms")
    known = {result.metric: result for result in score(items, "mms")}[metric]
    expected = (known.value, known.low, known.high)
    assert (entry.mean, entry.mean_low, entry.mean_high) == expected
    assert (entry.worst, entry.worst_low, entry.worst_high) == expected
    assert known.low < known.high
    assert entry.spread == 0.0
    # Asked again in other words with the same answers: an utterance is drawn as one, so nothing gets narrower.
    (twice,) = robustness([*items, *(replace(item, prompt="q") for item in items)], "mms")
    assert (twice.mean, twice.mean_low, twice.mean_high) == pytest.approx(expected)


def test_the_worst_is_the_lowest_where_higher_is_better() -> None:
    items = [said("sqa", "u0", "a boat", "boat", "p"), said("sqa", "u0", "a boat", "bird", "q")]
    (entry,) = robustness(items, "mms")
    assert (entry.worst, entry.worst_prompt, entry.mean) == (0.0, "q", 0.5)


def test_wordings_that_were_asked_about_other_utterances_are_told() -> None:
    entries = robustness([*ASR[:2], said("asr", "u2", "old stones", "cold stones", "q")], "mms")
    assert not entries[0].paired
    assert np.isfinite([entries[0].mean_low, entries[0].mean_high]).all()  # some draws have no answer to q
    assert "* each wording was asked about other utterances" in table(entries)
    assert "*" not in table(robustness(ASR, "mms"))


def test_the_order_of_answers_changes_nothing() -> None:
    (one,), (other,) = robustness(ASR, "mms"), robustness(ASR[::-1], "mms")
    assert one.by_prompt == other.by_prompt
    assert (one.mean_low, one.mean_high, one.spread) == pytest.approx((other.mean_low, other.mean_high, other.spread))


SENTENCE = {"asr": "the boy sees two old boats", "st-fr": "le garçon voit deux vieux bateaux",
            "st-de": "der Junge sieht zwei alte Boote", "sqa": "two old boats"}  # fmt: skip


def asked(task: str, hypothesis: str) -> Hypothesis:
    name, _, lang = task.partition("-")
    return said(name, "u0", SENTENCE[task], hypothesis, lang=lang or "en")


@pytest.mark.parametrize(
    ("task", "hypothesis", "expected"),
    [
        ("asr", "The boy sees two cold boats.", "asr"),
        ("asr", "le garcon voit deux vieux bateaux", "st-fr"),
        ("asr", "two old boats", "sqa"),
        ("sqa", "the boy sees two old boats", "asr"),
        ("sqa", "two gold coats", "sqa"),
        ("sqa", "a small house", NONE),
        ("st-fr", "der Junge sieht zwei alte Boote", "st-de"),
        ("st-fr", "le garçon voit", NONE),
        ("st-de", "", NONE),
        ("st-de", "the boy boy boy boy boy boy boy boy boy boy boy", NONE),
    ],
)
def test_the_task_that_is_answered(task: str, hypothesis: str, expected: str) -> None:
    whole = [asked(other, SENTENCE[other]) for other in SENTENCE if other != task]
    assert answered([asked(task, hypothesis), *whole]) == [expected, *(other for other in SENTENCE if other != task)]


def test_the_answer_to_another_question_is_no_other_task() -> None:
    items = [said("sqa", "u0", "a boat", "two birds"), said("sqa", "u0", "two birds", "x"), asked("asr", "x")]
    assert answered(items)[0] == "sqa"


def test_references_that_are_alike_accuse_nobody() -> None:
    items = [said("asr", "u0", "anna", "anna"), said("st", "u0", "Anna!", "anna", lang="fr")]
    assert answered(items) == ["asr", "st-fr"]


def test_without_another_reference_nothing_is_said() -> None:
    assert answered(ASR) == [None] * len(ASR)
    (entry,) = robustness(ASR, "mms")
    assert (entry.other_task, entry.other_task_low, entry.answered) == (None, None, {})
    assert answered([]) == []


def miniature(count: int) -> list[Hypothesis]:
    """Every task about some sentences of the miniature, each answered as it should be."""
    world, rng, items = World(WorldConfig()), np.random.default_rng(5), []
    for n in range(count):
        sentence = world.sample(rng, "test")
        truths = [("asr", "en", sentence.text), ("st", "fr", sentence.french), ("st", "de", sentence.german),
                  ("sqa", "en", sentence.questions[0].answer)]  # fmt: skip
        items += [said(task, f"u{n}", text, text, lang=lang) for task, lang, text in truths]
    return items


def test_on_the_miniature_no_right_answer_is_accused_and_other_tasks_are_found() -> None:
    items = miniature(50)
    assert answered(items) == ["asr", "st-fr", "st-de", "sqa"] * 50
    # Each answer goes to the next task of its utterance.
    moved = [replace(item, hypothesis=items[i - i % 4 + (i + 1) % 4].reference) for i, item in enumerate(items)]
    entries = {entry.task: entry for entry in robustness(moved, "mms")}
    assert entries["asr"].other_task == entries["asr"].answered["st-fr"] / 50
    assert min(entry.other_task or 0.0 for entry in entries.values()) >= 0.9
    assert max(entry.answered.get(task, 0) for task, entry in entries.items()) <= 2
    shown = confusion(entries.values()).splitlines()
    assert shown[0].split() == ["asked", "asr", "sqa", "st-de", "st-fr", "none"]
    assert int(shown[1].split()[4]) == entries["asr"].answered["st-fr"]


def test_groups_of_prompts_and_systems_are_told_apart_and_written(tmp_path: Path) -> None:
    items = [*ASR, *(replace(item, group="held_out", hypothesis="") for item in ASR)]
    entries = robustness(items, "mms")
    assert [(entry.prompts, entry.worst) for entry in entries][1] == ("held_out", 100.0)
    write(tmp_path / "robustness.json", entries)
    assert [Robustness(**row) for row in json.loads((tmp_path / "robustness.json").read_text())] == entries
    assert len(table(entries).splitlines()) == 3


def test_an_unknown_task_is_one_line() -> None:
    with pytest.raises(UserError, match="u0: unknown task 'tts'; known are: asr, st, sqa"):
        robustness([said("tts", "u0", "a", "a")], "mms")
