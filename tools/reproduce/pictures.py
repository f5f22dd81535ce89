"""The table in three pictures, as small SVG files of a page's width."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from sm_train.runlog import METRICS as METRICS_FILE
from tools.reproduce.graph import Places
from tools.reproduce.results import Results
from tools.reproduce.tallies import Interval, Place
from tools.reproduce.world import MAIN

COLOURS = ("#3b6fb6", "#c8553d", "#3f8f5f", "#8b5fa8", "#b58a2b", "#4a9aa8", "#a8486f", "#6b6f76", "#7a9e3d", "#222222")
MARKS = "osD^vPX*ph"
INK, RULE = "#5b6068", "#c9ccd1"


def all_of(found: Results, root: Path) -> dict[str, str]:
    """SVG texts by file name; those that there is something to draw for."""
    voices = next(iter(found.world.voices))
    drawn = {
        "compute.svg": _svg((7.2, 3.6), lambda axes: _against_compute(axes, found, voices)) if found.own else "",
        "tasks.svg": _svg((7.2, 3.6), lambda axes: _by_task(axes, found, voices)) if found.scores else "",
    }
    curves = _valid_wers(found, root)
    if curves:
        drawn["stage1.svg"] = _svg((7.2, 3.2), lambda axes: _stage_1(axes, curves))
    return {name: text for name, text in drawn.items() if text}


def _against_compute(axes: Any, found: Results, voices: str) -> None:
    """Mean chrF of both languages over FLOPs of training, the base's included."""
    split = found.world.voices[voices]
    rows = [row for row in found.own if found.whole[row].flop > 0]
    for number, row in enumerate(rows):
        flop = found.whole[row].flop
        one = _chrf(found, row, split)
        if one is None:
            continue
        colour, mark = COLOURS[number % len(COLOURS)], MARKS[number % len(MARKS)]
        axes.errorbar(
            [flop], [one.value], yerr=[[max(one.value - one.low, 0)], [max(one.high - one.value, 0)]], fmt=mark,
            color=colour, capsize=2, markersize=5, linewidth=1, label=found.world.rows[row].title,
        )  # fmt: skip
    for row in ("topline", "cascade"):
        if row in found.scores and (one := _chrf(found, row, split)):
            axes.axhline(one.value, color=INK, linewidth=0.8, linestyle=":" if row == "cascade" else "--")
            axes.annotate(
                row, (0.005, one.value), xycoords=("axes fraction", "data"), fontsize=7, va="bottom", color=INK
            )
    axes.set_xscale("log")
    axes.set_xlabel("FLOPs of training, what it builds on included")
    axes.set_ylabel("chrF, mean of fr and de")
    axes.set_title(f"Translation against training compute ({voices}, held-out prompts)", loc="left", fontsize=9)
    _legend(axes)


def _chrf(found: Results, row: str, split: str) -> Interval | None:
    return found.interval(row, *(Place(f"st-{language} chrF", split, "held_out") for language in ("fr", "de")))


def _by_task(axes: Any, found: Results, voices: str) -> None:
    """Words right, chrF and accuracy of the main rows side by side: what a row was tuned on, and what it was not."""
    split = found.world.voices[voices]
    rows = [row for row in found.scores if found.world.rows[row].group == MAIN]
    bars: list[tuple[str, Sequence[str], Callable[[float], float]]] = [
        ("ASR: 100 - WER", ["asr WER"], lambda value: max(100 - value, 0)),
        ("ST: chrF, fr and de", ["st-fr chrF", "st-de chrF"], lambda value: value),
        ("SQA: accuracy x 100", ["sqa accuracy"], lambda value: 100 * value),
    ]
    width = 0.8 / len(bars)
    for number, (title, metrics, scaled) in enumerate(bars):
        at, heights, below, above = [], [], [], []
        for place_of_row, row in enumerate(rows):
            one = found.interval(row, *(Place(metric, split, "held_out") for metric in metrics))
            if one is None:
                continue
            value, *ends = map(scaled, (one.value, one.low, one.high))
            at.append(place_of_row + (number - (len(bars) - 1) / 2) * width)
            heights.append(value)
            below.append(max(value - min(ends), 0))
            above.append(max(max(ends) - value, 0))
        axes.bar(at, heights, width, color=COLOURS[number], label=title)
        axes.errorbar(at, heights, yerr=[below, above], fmt="none", ecolor=INK, elinewidth=0.8, capsize=1.5)
    titles = [found.world.rows[row].title.partition(":")[0] for row in rows]
    axes.set_xticks(range(len(rows)), titles, rotation=28, ha="right", fontsize=7.5)
    axes.set_ylim(0, 100)
    axes.set_title(f"What each row can do ({voices}, held-out prompts)", loc="left", fontsize=9)
    _legend(axes)


Curve = tuple[str, list[int], list[float]]


def _valid_wers(found: Results, root: Path) -> list[Curve]:
    """Validation WER over steps of every seed of the first row that is pretrained."""
    row = next((row for row, asked in found.world.rows.items() if asked.kind == "pretrain"), None)
    curves = []
    for seed in found.world.seeds_of(row) if row else []:
        path = Places(root).run(str(row), seed) / METRICS_FILE
        if not path.is_file():
            continue
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if '"valid_wer"' in line]
        if lines:
            curves.append((f"seed {seed}", [line["step"] for line in lines], [line["valid_wer"] for line in lines]))
    return curves


def _stage_1(axes: Any, curves: Sequence[Curve]) -> None:
    for number, (label, steps, wers) in enumerate(curves):
        axes.plot(steps, [100 * wer for wer in wers], color=COLOURS[number], linewidth=1.2, marker=".", label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("WER of the nearest tokens, %")
    axes.set_title("Stage 1, no LLM: from most words to nearly all (valid)", loc="left", fontsize=9)
    _legend(axes)


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), labelcolor=INK)


def _svg(inches: tuple[float, float], draw: Callable[[Any], None]) -> str:
    """The same bytes every time, on a transparent ground, in colours that a light and a dark page both bear."""
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "reproduce", "font.size": 8, "text.color": INK}
    style |= {"axes.edgecolor": RULE, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True}
    style |= {"grid.color": RULE, "grid.linewidth": 0.4, "axes.titlecolor": INK}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=inches, layout="constrained")
        draw(figure.add_subplot())
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return text.getvalue()
