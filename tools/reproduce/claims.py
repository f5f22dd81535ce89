"""Claims against the figures: each a difference of two rows, with its interval and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass

from tools.reproduce.results import Results
from tools.reproduce.tallies import Interval, Place, difference
from tools.reproduce.world import METRICS, ClaimConfig

HOLDS, FAILS, OPEN = "holds", "does not hold", "undecided"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A claim on one column."""

    place: Place
    voices: str
    found: Interval
    says: str
    """holds | does not hold | undecided"""


def judge(claim: ClaimConfig, found: Results) -> list[Verdict]:
    """The claim on each of its columns, prompts and voices that both rows have; none where they have none."""
    verdicts = []
    for voices in claim.voices or found.world.voices:
        for prompts in claim.prompts:
            for metric in claim.columns:
                place = Place(metric, found.world.voices[voices], prompts)
                a, b = (found.scores.get(row, {}).get(place) for row in (claim.a, claim.b))
                apart = difference(a, b) if a and b else None
                if apart:
                    verdicts.append(Verdict(place, voices, apart, decide(claim, apart)))
    return verdicts


def decide(claim: ClaimConfig, apart: Interval) -> str:
    """Whether the whole interval of a - b lies on the claimed side of the bound, on the other, or on both."""
    if claim.below is not None:
        return HOLDS if apart.high < claim.below else FAILS if apart.low > claim.below else OPEN
    bound = claim.above or 0.0
    return HOLDS if apart.low > bound else FAILS if apart.high < bound else OPEN


def overall(verdicts: list[Verdict]) -> str:
    """One word for all columns where they agree; else how many say what."""
    said = [verdict.says for verdict in verdicts]
    if not said:
        return "not known yet"
    if len(set(said)) == 1:
        return said[0]
    counts = [f"{says} on {said.count(says)}" for says in (HOLDS, FAILS, OPEN) if says in said]
    return f"{HOLDS if HOLDS in said else FAILS} in part ({', '.join(counts)})"


def page(found: Results, name: str, command: str) -> str:
    """The whole of claims.md: a paragraph a claim."""
    parts = [
        f"# {name}: what holds\n\n`{command}`\n\nA claim *holds* where the whole 95% interval of the difference of two "
        "rows lies on the claimed side (paired bootstrap over seeds and utterances, [table.md](table.md)), *does not "
        "hold* where it lies on the other, and is *undecided* where it lies on both. With one seed the interval is "
        "over utterances alone. No correction is made for the number of claims."
    ]
    for claim in found.world.claims:
        verdicts = judge(claim, found)
        parts.append(f"**{claim.says}: {overall(verdicts)}.** {_detail(claim, verdicts, found)}".rstrip())
    return "\n\n".join(parts) + "\n"


def _detail(claim: ClaimConfig, verdicts: list[Verdict], found: Results) -> str:
    if not verdicts:
        return f"There is no figure yet of *{claim.a}* or of *{claim.b}*."
    a, b = (found.world.rows[row].title for row in (claim.a, claim.b))
    bound = f"below {claim.below:g}" if claim.below is not None else f"above {claim.above or 0.0:g}"
    seeds = sorted({seed for verdict in verdicts for seed in verdict.found.seeds if seed >= 0})
    over = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" if seeds else "no seeds"
    cells = "; ".join(_one(verdict, len({v.says for v in verdicts}) > 1) for verdict in verdicts)
    return f"*{a}* less *{b}*, claimed {bound}, {over}: {cells}."


def _one(verdict: Verdict, with_word: bool) -> str:
    title, digits, _ = METRICS[verdict.place.metric]
    one, prompts = verdict.found, verdict.place.prompts.replace("_", "-")
    word = f", {verdict.says}" if with_word else ""
    figures = f"{one.value:+.{digits}f} ({one.low:+.{digits}f} to {one.high:+.{digits}f})"
    return f"{title} {figures} ({verdict.voices}, {prompts} prompts{word})"
