"""Figures, tables and claims from small made hypotheses with known answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sm_train import config
from sm_train.errors import UserError
from sm_train.scoring import robustness
from sm_train.scoring.scores import Hypothesis, score, write_hypotheses
from tools.reproduce import claims, pictures, table, tallies
from tools.reproduce.compute import Compute
from tools.reproduce.results import NO_SEED, Results
from tools.reproduce.tallies import Place, Tally
from tools.reproduce.world import STAGES, ClaimConfig, WorldConfig

BASE = Hypothesis("stage 1", "asr", "en", "test", 0, "u00", "Repeat: {speech}", "a red cat sees two", "", "held_out")
WER = Place("asr WER", "test", "held_out")
ACCURACY = Place("sqa accuracy", "test", "held_out")


def spoken(wrong: int, count: int = 40) -> list[Hypothesis]:
    """So many of the answers have one wrong word of five; transcripts without the LLM have two, all of them."""
    said = [replace(BASE, ordinal=i, id=f"u{i:02d}", hypothesis="a red cat sees two") for i in range(count)]
    said = [replace(one, hypothesis="a red dog sees two") if i < wrong else one for i, one in enumerate(said)]
    alone = [replace(one, system="stage 1, no LLM", hypothesis="a red dog saw two") for one in said]
    return said + alone


def tally(*right: bool) -> Tally:
    """Of an accuracy, from whether each utterance's answer is right."""
    stats_UK = np.array([[one, 1] for one in right], np.float64)
    resampled = tallies.draws(len(right)) @ stats_UK
    return Tally(float(np.mean(right)), resampled[:, 0] / resampled[:, 1], tuple(f"u{i}" for i in range(len(right))))


def test_values_and_single_seed_intervals_are_those_of_the_scores(tmp_path: Path) -> None:
    said = spoken(wrong=10)
    write_hypotheses(tmp_path / "hypotheses.jsonl", said)
    found = tallies.read(tmp_path, "mms", None, ["asr WER", "asr WER, no LLM", "sqa accuracy"])
    assert set(found) == {"stage 1"}
    expected = next(r for r in score(said, "mms") if r.metric == "WER" and r.system == "stage 1")
    interval = tallies.over_seeds({0: found["stage 1"][WER]})
    assert interval.value == pytest.approx(expected.value) == pytest.approx(5.0)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=0.6)
    assert interval.count == 40
    alone = tallies.over_seeds({0: found["stage 1"][Place("asr WER, no LLM", "test", "held_out")]})
    assert (alone.value, alone.low, alone.high) == pytest.approx((40.0, 40.0, 40.0))


def test_languages_groups_and_splits_stand_apart_and_in_language_is_of_both(tmp_path: Path) -> None:
    french = replace(BASE, task="st", target_lang="fr", reference="un chat", hypothesis="un chat")
    said = [french, replace(french, target_lang="de", reference="eine Katze", hypothesis="zzz"),
            replace(french, group="train", hypothesis="non")]  # fmt: skip
    write_hypotheses(tmp_path / "hypotheses.jsonl", said)

    class French:
        signature = "test"

        def of(self, text: str) -> frozenset[str]:
            return frozenset({"fr"})

    found = tallies.read(tmp_path, "mms", French(), ["st-fr chrF", "st-de chrF", "st in language"])["stage 1"]
    assert found[Place("st-fr chrF", "test", "held_out")].value == pytest.approx(100)
    assert found[Place("st-de chrF", "test", "held_out")].value < 10
    assert found[Place("st-fr chrF", "test", "train")].value < 50
    assert found[Place("st in language", "test", "held_out")].value == 0.5


def test_seeds_that_differ_widen_the_interval_of_their_mean() -> None:
    right, wrong = tally(*[True] * 20), tally(*[False] * 20)
    both = tallies.over_seeds({0: right, 1: wrong})
    assert (both.value, both.low, both.high) == (0.5, 0.0, 1.0)
    assert both.seeds == (0, 1)
    alike = tallies.over_seeds({0: right, 1: right})
    assert (alike.low, alike.high) == (1.0, 1.0)


def test_utterances_are_the_same_for_every_seed() -> None:
    """Seeds that are right on the same half are no more certain together than one alone."""
    half = tally(*[i % 2 == 0 for i in range(20)])
    one, three = tallies.over_seeds({0: half}), tallies.over_seeds({0: half, 1: half, 2: half})
    assert (three.low, three.high) == pytest.approx((one.low, one.high))


def test_a_difference_is_paired_over_the_seeds_that_both_have() -> None:
    half = [i % 2 == 0 for i in range(20)]
    better = tally(*[True, True, *half[2:]])
    apart = tallies.difference({0: better, 1: better}, {0: tally(*half), 5: tally(*half)})
    assert apart is not None
    assert apart.seeds == (0,)
    assert apart.value == pytest.approx(0.05)
    assert apart.low >= 0.0  # unpaired, chance alone would put it far below
    nothing = tallies.difference({0: better}, {1: better})
    assert nothing is None
    reference = tallies.difference({0: better, 1: better}, {NO_SEED: tally(*[True] * 20)})
    assert reference is not None
    assert reference.seeds == (0, 1)
    assert reference.value == pytest.approx(0.55 - 1)


def test_other_utterances_are_refused() -> None:
    with pytest.raises(UserError, match="same utterances"):
        tallies.difference({0: tally(True, True)}, {0: tally(True, True, False)})


def test_an_average_of_columns_averages_their_resamples() -> None:
    one, other = tally(*[True, False] * 10), tally(*[False, True] * 10)
    (mean,) = tallies.average([{0: one}, {0: other}]).values()
    assert mean.value == 0.5
    assert mean.resampled_R == pytest.approx(np.full(tallies.RESAMPLES, 0.5))  # what one loses the other wins


@pytest.fixture
def found() -> Results:
    rows = {"topline": {"title": "the text", "kind": "reference"}, "one": {"title": "stage 1", "kind": "pretrain"},
            "two": {"title": "stage 2", "kind": "tune", "base": "one"},
            "three": {"title": "x", "kind": "pretrain"}}  # fmt: skip
    claimed = [{"says": "Two is better", "a": "two", "b": "one", "columns": ["sqa accuracy"]},
               {"says": "Three is better", "a": "three", "b": "one", "columns": ["sqa accuracy"]}]  # fmt: skip
    world = config.from_mapping(
        WorldConfig, {**{name: {"file": "x"} for name in STAGES}, "rows": rows, "claims": claimed}, "test"
    )
    low, high = tally(*[i < 4 for i in range(20)]), tally(*[i < 16 for i in range(20)])
    scores = {"topline": {ACCURACY: {NO_SEED: tally(*[True] * 20)}},
              "one": {ACCURACY: {0: low, 1: low, 2: low}}, "two": {ACCURACY: {0: high, 1: high}}}  # fmt: skip
    own = {"one": Compute(0, 2e12, 10.0), "two": Compute(1.5e6, 1e12, 2.0)}
    asked = [Hypothesis("stage 2", "asr", "en", "test", 0, "u", prompt, "a b", said, "held_out")
             for prompt, said in (("p", "a b"), ("q", "a c"))]  # fmt: skip
    whole = {**own, "two": own["one"] + own["two"]}
    wordings = {"two": robustness.robustness(asked, "mms")}
    return Results(world, scores, own, whole, {"two": Compute(3000, 0, 0.5)}, wordings, ["old-0-evaluate"])


def test_the_table_has_figures_seeds_and_costs_with_what_a_row_builds_on(found: Results) -> None:
    page = table.page(found, "tiny", "python -m it")
    first = page.split("## Wording")[0]
    assert "| system | seeds | SQA accuracy | LLM tokens | TFLOP | minutes |" in first
    assert "| the text |  | 1.000 (1.000 to 1.000) |  |  |  |" in first
    (stage_2,) = [line for line in first.splitlines() if line.startswith("| stage 2")]
    assert stage_2.startswith("| stage 2 | 2 | 0.800 (0.")
    assert stage_2.endswith("| 1.5M | 1.0 (3.0) | 2.0 (12.0) |")
    assert "| stage 2 | 1.5M | 1.0 (3.0) | 2.0 (12.0) | 3k | 0.5 |" in page
    assert "| stage 2 | asr WER | 25.0 (25.0 to 25.0) | 35.4 | 50.0 |  |" in page
    assert "Every question in 2 held-out wordings (known voices, one seed)" in page
    assert page.endswith("than the world's now: old-0-evaluate.\n")
    assert "python -m it" in page


def test_claims_say_whether_they_hold_and_by_how_much(found: Results) -> None:
    page = claims.page(found, "tiny", "python -m it")
    assert (
        "**Two is better: holds.** *stage 2* less *stage 1*, claimed above 0, seeds 0, 1: SQA accuracy +0.600" in page
    )
    assert "**Three is better: not known yet.** There is no figure yet" in page


@pytest.mark.parametrize(
    ("bounds", "low", "high", "said"),
    [
        ({}, 0.1, 0.3, claims.HOLDS),
        ({}, -0.1, 0.3, claims.OPEN),
        ({}, -0.3, -0.1, claims.FAILS),
        ({}, 0.0, 0.0, claims.OPEN),
        ({"above": -1.0}, -0.9, 0.3, claims.HOLDS),
        ({"below": 0.0}, -0.3, -0.1, claims.HOLDS),
        ({"below": 0.0}, 0.1, 0.3, claims.FAILS),
        ({"below": 0.0}, -0.1, 0.3, claims.OPEN),
    ],
)
def test_a_claim_is_decided_by_the_whole_interval(bounds: dict[str, float], low: float, high: float, said: str) -> None:
    claim = ClaimConfig(says="s", a="a", b="b", columns=["asr WER"], **bounds)
    assert claims.decide(claim, tallies.Interval((low + high) / 2, low, high, (0,), 20)) == said


def test_pictures_are_the_same_bytes_every_time(found: Results, tmp_path: Path) -> None:
    drawn = pictures.all_of(found, tmp_path)
    assert set(drawn) == {"compute.svg", "tasks.svg"}  # no run has validated here
    assert "stage 2" in drawn["tasks.svg"]
    assert pictures.all_of(found, tmp_path) == drawn
