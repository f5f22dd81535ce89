"""The table as Markdown: what a reader looks for first, then everything."""

from __future__ import annotations

from collections.abc import Sequence

from tools.reproduce.compute import Compute
from tools.reproduce.results import Results
from tools.reproduce.tallies import Interval, Place
from tools.reproduce.world import METRICS, PROMPTS

FIRST = ("asr WER", "st-fr chrF", "st-de chrF", "st in language", "sqa accuracy")
"""The columns of the first table."""
PROMPTS_SAID = {"train": "prompts of the training", "held_out": "held-out prompts"}


def page(found: Results, name: str, command: str) -> str:
    """The whole of table.md."""
    parts = [f"# {name}: every row, with what it cost\n\n`{command}`\n\n{_how_to_read(found)}"]
    for voices in found.world.voices:
        if found.places("held_out", voices):
            parts.append(f"## {voices.capitalize()}, {PROMPTS_SAID['held_out']}\n\n{_first(found, voices)}")
    if found.wordings:
        parts.append(f"## Wording of the prompt\n\n{_wordings(found)}")
    parts.append(f"## Everything\n\n{_all(found)}")
    parts.append(f"## Compute\n\n{_compute(found)}")
    if found.left_out:
        parts.append(f"Left out, as made by other words or inputs than the world's now: {', '.join(found.left_out)}.")
    return "\n\n".join(parts) + "\n"


def _how_to_read(found: Results) -> str:
    seeds = ", ".join(map(str, found.world.seeds))
    return (
        f"Mean over seeds (of {seeds}; `seeds` says how many are there), in brackets a 95% bootstrap interval: seeds "
        "and utterances are drawn with replacement, all seeds on the same utterances. Where there is one seed, and for "
        "the references, it is over utterances alone and says nothing of other seeds; with three seeds it is rather "
        "too narrow. WER is in percent, lower is better; *in language* is the share of translations in the language "
        "asked for. Compute is training's, in the mean over seeds, in brackets with what the row builds on: tokens "
        "that the LLM read, FLOPs by formula (`tools/reproduce/compute.py`), wall minutes of one core."
    )


def _first(found: Results, voices: str) -> str:
    places = [place for place in found.places("held_out", voices) if place.metric in FIRST]
    heads = ["system", "seeds", *(METRICS[place.metric][0] for place in places), "LLM tokens", "TFLOP", "minutes"]
    rows = []
    for row in found.scores:
        cells = [found.world.rows[row].title, str(len(found.seeds(row)) or "")]
        cells += [cell(found.interval(row, place), place) for place in places]
        rows.append([*cells, *spent(found.own.get(row), found.whole.get(row))])
    return markdown(heads, rows)


def _wordings(found: Results) -> str:
    of = next(iter(found.wordings.values()))[0]
    how = (
        f"Every question in {len(of.by_prompt)} held-out wordings ({found.world.wordings.voices}, one seed): "
        "mean over wordings with its 95% bootstrap interval over utterances, standard deviation over wordings, the "
        "worst wording; *other task* is the share of answers nearer to another task's reference than to that of the "
        "task asked for (`sm_train/scoring/robustness.py`)."
    )
    heads = ["system", "task", "mean", "spread", "worst", "other task"]
    rows = []
    for row, entries in found.wordings.items():
        for number, e in enumerate(entries):
            digits = 3 if e.metric == "accuracy" else 1
            title = found.world.rows[row].title if number == 0 else ""
            mean = f"{e.mean:.{digits}f} ({e.mean_low:.{digits}f} to {e.mean_high:.{digits}f})"
            other = "" if e.other_task is None else f"{100 * e.other_task:.1f}%"
            rows.append([title, f"{e.task} {e.metric}", mean, f"{e.spread:.{digits}f}", f"{e.worst:.{digits}f}", other])
    return f"{how}\n\n{markdown(heads, rows)}"


def _all(found: Results) -> str:
    parts = []
    for voices in found.world.voices:
        for prompts in PROMPTS:
            if places := found.places(prompts, voices):
                heads = ["system", *(METRICS[place.metric][0] for place in places)]
                rows = [
                    [found.world.rows[row].title, *(cell(found.interval(row, place), place) for place in places)]
                    for row in found.scores
                ]
                parts.append(f"### {voices.capitalize()}, {PROMPTS_SAID[prompts]}\n\n{markdown(heads, rows)}")
    return "\n\n".join(parts)


def _compute(found: Results) -> str:
    heads = ["system", "LLM tokens", "TFLOP", "minutes", "evaluation: LLM tokens", "evaluation: minutes"]
    rows = []
    for row in found.scores:
        heard = found.heard.get(row)
        of_evaluation = [amount(heard.llm_tokens), f"{heard.minutes:.1f}"] if heard else ["", ""]
        rows.append([found.world.rows[row].title, *spent(found.own.get(row), found.whole.get(row)), *of_evaluation])
    return markdown(heads, rows)


def cell(interval: Interval | None, place: Place) -> str:
    """A figure with its interval."""
    if interval is None:
        return ""
    digits = METRICS[place.metric][1]
    return f"{interval.value:.{digits}f} ({interval.low:.{digits}f} to {interval.high:.{digits}f})"


def spent(own: Compute | None, whole: Compute | None) -> list[str]:
    """LLM tokens, TFLOP, minutes, each with the base's included in brackets where that is more."""
    if own is None or whole is None:
        return ["", "", ""]
    pairs = [
        (amount(own.llm_tokens), amount(whole.llm_tokens)),
        (f"{own.flop / 1e12:,.1f}", f"{whole.flop / 1e12:,.1f}"),
        (f"{own.minutes:,.1f}", f"{whole.minutes:,.1f}"),
    ]
    return [mine if mine == all_of_it else f"{mine} ({all_of_it})" for mine, all_of_it in pairs]


def amount(number: float) -> str:
    """Three figures and a letter: 12.3M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [list(heads), ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
