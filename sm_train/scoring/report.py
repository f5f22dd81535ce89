"""One page that shows a run: report.html, self-contained, without scripts, from the files of the run folder."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from sm_train import files
from sm_train.scoring.fragments import TOPLINE, Example, example_card, mistakes, place_name, score_table, task_name
from sm_train.scoring.pictures import Floats, Projection, curve_svg, projection_svg
from sm_train.scoring.scores import Hypothesis, Result, read_hypotheses, read_results

__all__ = ["Example", "Projection", "build_report"]

_HOW_TO_READ = (
    "Each row is a system, each value stands above its 95% interval (bootstrap over utterances), drawn below it on the "
    "metric's whole scale. <b>Bold</b> is the best value apart from the topline; where intervals overlap it means "
    "little. WER and CER count errors in percent: lower is better. All else is better when higher; <i>exact</i> and "
    "<i>accuracy</i> are shares of answers that are right to the word, <i>in language</i> of those in the language "
    "asked for."
)
_TOPLINE_NOTE = (
    "The <i>topline</i> is the language model reading the true transcript instead of hearing the speech: the mark to "
    "reach. The bars at the right show how much of it (chrF, accuracy) each system keeps."
)
_MARKS = (
    "<mark>Marked</mark> words are not in the reference, <del>struck</del> ones are missing; case and punctuation are "
    'not compared. <span class="tick">\u2713</span> is right to the word (an article too, which accuracy forgives).'
)


def build_report(
    folder: Path, examples: Sequence[Example], picture: Projection | None, run: Path | None = None,
    tuned: Sequence[tuple[str, Path]] = (),
) -> Path:  # fmt: skip
    """Write ``folder/report.html`` from results.json and hypotheses.jsonl beside it, and return its path.

    ``run``: the run folder of the pretraining behind these results, for its curves (metrics.jsonl) and config.yaml;
    what it lacks is left out, and so are unknown or missing keys and a torn last line of its metrics. ``tuned``: name
    and run folder of each tuned mapper among the systems, for the same.
    Raises :class:`UserError` where results or hypotheses cannot be read.
    """
    results = read_results(folder / "results.json")
    hypotheses = read_hypotheses(folder / "hypotheses.jsonl")
    lines = _read_metrics(run / "metrics.jsonl") if run else []
    sections = {
        "Scores": _scores(results),
        "Training": _training(lines),
        "Tuning": _tuning(tuned),
        "Where speech lands": _projection(picture),
        "Listen": _examples(examples),
        "Mistakes": f'<p class="note">{_MARKS}</p>{mistakes(hypotheses)}' if hypotheses else "",
        "Prompts": _prompts(hypotheses),
        "Configuration": _config(run / "config.yaml") if run else "",
    }
    shown = {title: body for title, body in sections.items() if body}
    anchors = {title: title.lower().replace(" ", "-") for title in shown}
    page = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8")).substitute(
        title=escape(folder.resolve().name),
        lead=_lead(results),
        facts=_facts(results, hypotheses, lines),
        links="".join(f'<a href="#{anchor}">{title}</a>' for title, anchor in anchors.items()),
        sections="".join(f'<section id="{anchors[t]}"><h2>{t}</h2>{body}</section>' for t, body in shown.items()),
        footnotes=_footnotes(results),
    )
    path = folder / "report.html"
    files.write_text(path, page)
    return path


def _lead(results: Sequence[Result]) -> str:
    systems = list(dict.fromkeys(escape(result.system) for result in results))
    tasks = list(dict.fromkeys(escape(task_name(result.task)) for result in results))
    return (
        "A frozen language model hears through a speech mapper, and is measured against what it can do with text. "
        f"Systems: {'; '.join(systems) or 'none'}. Tasks: {', '.join(tasks) or 'none'}."
    )


def _facts(results: Sequence[Result], hypotheses: Sequence[Hypothesis], lines: Sequence[dict[str, float]]) -> str:
    facts = [
        (f"{len({item.id for item in hypotheses if item.split == split}):,}", f"utterances in {split}")
        for split in dict.fromkeys(item.split for item in hypotheses)
    ]
    facts += [(f"{len(hypotheses):,}", "answers scored")]
    facts += [(f"{sum(not item.hypothesis.strip() for item in hypotheses):,}", "of them empty")]
    steps, wer = _curve(lines, "valid_wer")
    if len(wer):
        facts.append((f"{100 * wer.min():.1f}%", f"best validation WER, step {steps[wer.argmin()]:,.0f}"))
    if lines:
        facts.append((f"{max(line['step'] for line in lines):,.0f}", "training steps"))
    _, speeds = _curve(lines, "audio_h_per_s")
    if len(speeds):
        hourly = 3600 * float(np.median(speeds))
        facts.append((f"{hourly:,.0f}" if hourly >= 100 else f"{hourly:.2g}", "hours of audio an hour, median"))
    _, memory = _curve(lines, "peak_memory_mb")
    if len(memory):
        facts.append((f"{memory.max():,.0f} MB", "peak memory"))
    return "".join(f"<li><b>{escape(value)}</b><span>{escape(title)}</span></li>" for value, title in facts)


def _scores(results: Sequence[Result]) -> str:
    if not results:
        return ""
    note = f" {_TOPLINE_NOTE}" if any(result.system == TOPLINE for result in results) else ""
    parts = [f"<p>{_HOW_TO_READ}{note}</p>"]
    groups = len({result.prompts for result in results})
    for split, prompts in dict.fromkeys((result.split, result.prompts) for result in results):
        here = [result for result in results if (result.split, result.prompts) == (split, prompts)]
        count, title = max(result.count for result in here), escape(place_name(split, prompts, groups))
        parts.append(f'<h3>{title} <span class="note">(up to {count:,} answers a cell)</span></h3>')
        parts.append(score_table(here))
    return "".join(parts)


def _training(lines: Sequence[dict[str, float]]) -> str:
    """Curves, each where the metrics hold it: loss terms, validation WER, vocabulary, learning rate."""
    terms = sorted({key for line in lines for key in line if key == "loss" or key.startswith("loss_")})
    curves = {("total" if key == "loss" else key[5:]): _curve(lines, key) for key in terms}
    positive = {name: curve for name, curve in curves.items() if (curve[1] > 0).all()}
    signed = {name: curve for name, curve in curves.items() if name not in positive}
    steps, wer = _curve(lines, "valid_wer")
    panels = [
        ("loss", "Loss by term (log)", positive, True),
        ("signed", "Loss terms that can be negative", signed, False),
        ("wer", "Validation WER, nearest token (%)", {"": (steps, 100 * wer)}, False),
        ("answers", "Answer tokens right, answers given", {"": _curve(lines, "valid_accuracy")}, False),
        ("vocabulary", "Vocabulary of those transcripts (tokens)", {"": _curve(lines, "valid_vocabulary")}, False),
        ("rate", "Learning rate", {"": _curve(lines, "lr")}, False),
    ]
    starts = {line.get("attempt", 0.0): line["step"] for line in reversed(lines)}
    marks = sorted(starts.values())[1:]
    figures = [
        f"<figure>{curve_svg(name, title, drawn, marks, log)}</figure>"
        for name, title, drawn, log in panels
        if any(len(values) for _, values in drawn.values())
    ]
    note = '<p class="note">Dotted lines: the run was stopped and resumed there.</p>' if marks and figures else ""
    return f'{note}<div class="curves">{"".join(figures)}</div>' if figures else ""


def _tuning(tuned: Sequence[tuple[str, Path]]) -> str:
    parts = []
    for name, run in tuned:
        curves = _training(_read_metrics(run / "metrics.jsonl"))
        title = f'<h3>{escape(name)} <span class="note">{escape(str(run))}</span></h3>'
        parts.append(title + curves + _config(run / "config.yaml"))
    return "".join(parts)


def _read_metrics(path: Path) -> list[dict[str, float]]:
    """The finite numbers of each line that has a step, in the order of the file; of a missing file, none."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = []
    for row in text.split("\n"):
        try:
            values: Any = json.loads(row)
        except ValueError:
            continue
        if isinstance(values, dict):
            numbers = {k: float(v) for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
            lines += [numbers] if "step" in numbers else []
    return lines


def _curve(lines: Sequence[dict[str, float]], key: str) -> tuple[Floats, Floats]:
    """(steps, values) of a key, by step; of two lines for a step the later one counts."""
    points = sorted({line["step"]: line[key] for line in lines if key in line}.items())
    steps, values = np.array(points, np.float64).reshape(-1, 2).T
    return steps, values


def _projection(picture: Projection | None) -> str:
    if picture is None:
        return ""
    return (
        "<p>Mapped positions (dots) among the token embeddings of the language model (crosses), along the two axes "
        "of their largest variance. A line leads from each dot to the embedding that is nearest in all dimensions, "
        "not only in these two: a good mapper has its dots on the crosses.</p>"
        f"<figure>{projection_svg(picture)}</figure>"
    )


def _examples(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    return f'<p class="note">{_MARKS}</p>{"".join(example_card(example) for example in examples)}'


def _prompts(hypotheses: Sequence[Hypothesis]) -> str:
    """The wording of each task's prompts; of many (a question each), the first few."""
    asked: dict[str, dict[str, None]] = {}
    for item in hypotheses:
        task = f"st-{item.target_lang}" if item.task == "st" else item.task
        asked.setdefault(task, {})[item.prompt] = None
    rows = []
    for task, prompts in asked.items():
        shown = "<br>".join(escape(prompt) for prompt in list(prompts)[:6])
        more = f'<br><span class="note">and {len(prompts) - 6:,} more</span>' if len(prompts) > 6 else ""
        rows.append(f'<tr><th>{escape(task_name(task))}</th><td dir="auto">{shown}{more}</td></tr>')
    return f'<table class="answers"><tbody>{"".join(rows)}</tbody></table>' if rows else ""


def _config(path: Path) -> str:
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    return f"<details><summary>config.yaml, as this run resolved it</summary><pre>{escape(text)}</pre></details>"


def _footnotes(results: Sequence[Result]) -> str:
    signatures = dict.fromkeys(result.signature for result in results)
    items = "".join(f"<li><code>{escape(signature)}</code></li>" for signature in signatures)
    return f'<p class="note">Signatures of the metrics</p><ul class="note">{items}</ul>' if items else ""
