"""What a judge is asked about hypotheses, and results against values worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sm_train.errors import UserError
from sm_train.records import Task
from sm_train.scoring.judge import Claim, Verdict
from sm_train.scoring.judged import ACCURACY, AGREEMENT, KAPPA, MASS, claims_of, judged, kappa
from sm_train.scoring.scores import Hypothesis, score


def said(id: str, reference: str, hypothesis: str, system: str = "stage 1", prompt: str = "p") -> Hypothesis:
    return Hypothesis(system, "sqa", "en", "test", 0, id, prompt, reference, hypothesis)


def task(id: str, question: str, answer: str) -> Task:
    return Task(id, "sqa", {"question": question}, "en", answer)


TASKS = [
    task("a", "what runs", "the boat"),
    task("a", "what is red", "the boat"),
    task("a", "who sees it", "a bird"),
    Task("a", "asr", {}, "en", "a bird sees the red boat"),
    task("b", "what is old", "a house"),
]


def test_questions_of_one_utterance_with_one_answer_come_in_order() -> None:
    told = [said("a", "the boat", f"{system} {n}", system) for system in ("x", "y") for n in range(2)]
    claims = claims_of([*told, said("b", "a house", "house")], TASKS, with_context=False)
    assert [claim.question for claim in claims] == ["what runs", "what is red"] * 2 + ["what is old"]
    assert claims[1] == Claim("what is red", "the boat", "x 1")


def test_every_paraphrase_asks_all_questions_again() -> None:
    told = [said("a", "the boat", "", prompt=prompt) for prompt in ("p", "q", "p", "q")]
    assert [claim.question for claim in claims_of(told, TASKS, False)] == ["what runs"] * 2 + ["what is red"] * 2


def test_the_transcript_is_given_where_the_prompt_has_it() -> None:
    assert claims_of([said("a", "a bird", "x")], TASKS, True)[0].context == "a bird sees the red boat"
    with pytest.raises(UserError, match=r"b: its transcript, for \{context\}, is no asr task"):
        claims_of([said("b", "a house", "x")], TASKS, True)


@pytest.mark.parametrize(
    ("hypotheses", "message"),
    [
        ([said("a", "a dog", "x")], r"a: no question with the answer 'a dog' in the instructions"),
        ([said("a", "the boat", "x")], r"a: 2 questions have the answer 'the boat', stage 1 answered 1"),
    ],
)
def test_a_question_that_is_not_there_is_one_line(hypotheses: list[Hypothesis], message: str) -> None:
    with pytest.raises(UserError, match=message):
        claims_of(hypotheses, TASKS, False)


ANSWERS = [said(f"u{n}", "the boat", text) for n, text in enumerate(["a boat", "boats", "ship", "boat", "dog"])]
CHANCES = [0.9, 0.2, 0.8, 0.4, 0.1]  # the rule: right, wrong, wrong, right, wrong


def test_results_by_hand() -> None:
    verdicts = [Verdict(yes, 0.5 + yes / 10) for yes in CHANCES]
    results = judged(ANSWERS, verdicts, {"judge": "j", "hash": "h"}, "mms")
    values = {result.metric: result.value for result in results}
    assert values == {
        ACCURACY: pytest.approx(2 / 5),
        AGREEMENT: pytest.approx(3 / 5),
        KAPPA: pytest.approx((0.6 - 0.52) / (1 - 0.52)),
        MASS: pytest.approx(0.5 + sum(CHANCES) / 50),
    }
    assert all(result.low <= result.value <= result.high for result in results)
    assert all("judge:j|hash:h|" in result.signature for result in results)
    assert [result.count for result in results] == [5] * 4


def test_intervals_are_those_of_scores() -> None:
    """A judge that follows the rule has the rule's accuracy and its very interval."""
    rule = score(ANSWERS, "mms")[0]
    verdicts = [Verdict(yes, 1.0) for yes in (1.0, 0.0, 0.0, 1.0, 0.0)]
    ours = {result.metric: result for result in judged(ANSWERS, verdicts, {}, "mms")}
    assert (ours[ACCURACY].value, ours[ACCURACY].low, ours[ACCURACY].high) == (rule.value, rule.low, rule.high)
    assert ours[AGREEMENT].low == ours[KAPPA].value == 1.0


def test_systems_and_groups_are_judged_apart() -> None:
    others = [replace(item, group="held_out") for item in ANSWERS]
    verdicts = [Verdict(1.0, 1.0)] * 5 + [Verdict(0.0, 1.0)] * 5
    results = judged([*ANSWERS, *others], verdicts, {}, "mms")
    assert [(r.prompts, r.value) for r in results if r.metric == ACCURACY] == [("train", 1.0), ("held_out", 0.0)]


def test_kappa_by_hand() -> None:
    assert kappa(np.array([20.0, 5, 10, 15])) == pytest.approx(0.4)
    assert kappa(np.array([5.0, 5, 0, 0])) == 0.0  # one of them always says yes
    assert kappa(np.array([5.0, 0, 0, 0])) == 0.0
