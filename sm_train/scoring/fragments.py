"""Pieces of the report as HTML text. Every text from outside passes through ``escape`` here, once."""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from html import escape
from pathlib import Path

from sm_train.data.text import normalise
from sm_train.scoring.scores import IN_LANGUAGE, Hypothesis, Result

TOPLINE = "topline"
_LOWER_IS_BETTER = ("WER", "CER")
_ARROWS = ("\u2191", "\u2193")
_SHARED = ("chrF", "accuracy")
_ORDER = ("WER", "CER", "chrF", IN_LANGUAGE, "BLEU", "exact", "accuracy")
_MISTAKES_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Example:
    """One utterance to listen to, with what each system said to each prompt."""

    ordinal: int
    id: str
    split: str
    text: str
    audio: Path | None
    """A FLAC or WAV file, embedded in the page."""
    rows: Sequence[tuple[str, str, str, str, str]]
    """(system, task, prompt, reference, hypothesis)"""


def task_name(task: str) -> str:
    """How a task of results.json is called on the page."""
    return f"ST\u00a0\u2192\u00a0{task[3:]}" if task.startswith("st-") else task.upper()


def difference(reference: str, hypothesis: str) -> tuple[str, bool]:
    """(the hypothesis as HTML, whether its words are the reference's).

    Words that the reference has not are in ``<mark>``, words that it has and the hypothesis lacks in ``<del>``. They
    are compared under ``mms``, so that case and punctuation mark nothing.
    """
    wanted, said = _keyed_words(reference), _keyed_words(hypothesis)
    matcher = SequenceMatcher(None, [key for _, key in wanted], [key for _, key in said], autojunk=False)
    pieces = [] if hypothesis.strip() else ['<span class="nothing">(nothing)</span>']
    same = True
    for kind, low, high, start, end in matcher.get_opcodes():
        ours, theirs = (" ".join(escape(word) for word, _ in words) for words in (said[start:end], wanted[low:high]))
        if kind == "equal":
            pieces.append(ours)
            continue
        same = False
        pieces += [f"<mark>{ours}</mark>"] if ours else []
        pieces += [f"<del>{theirs}</del>"] if theirs else []
    return " ".join(pieces), same


def _keyed_words(text: str) -> list[tuple[str, str]]:
    """(word as written, word as compared); what compares as nothing, a lone dash, stays with its neighbour."""
    words: list[tuple[str, str]] = []
    waiting = ""
    for word in text.split():
        key = normalise(word, "mms")
        if key:
            words.append((waiting + word, key))
            waiting = ""
        elif words:
            words[-1] = (f"{words[-1][0]} {word}", words[-1][1])
        else:
            waiting += f"{word} "
    return words or ([(waiting.strip(), "")] if waiting else [])


def score_table(results: Sequence[Result]) -> str:
    """Systems x metrics of one split and group: values with intervals, and each system's share of the topline."""
    cells = {(r.system, r.task, r.metric): r for r in results}
    systems = list(dict.fromkeys(system for system, _, _ in cells))
    tasks = list(dict.fromkeys(task for _, task, _ in cells))
    metrics = {
        task: sorted(
            dict.fromkeys(metric for _, of, metric in cells if of == task),
            key=lambda metric: _ORDER.index(metric) if metric in _ORDER else len(_ORDER),
        )
        for task in tasks
    }
    columns = [(task, metric) for task in tasks for metric in metrics[task]]
    shares = TOPLINE in systems and len(systems) > 1 and any(metric in _SHARED for _, metric in columns)
    head = "".join(f'<th class="first" colspan="{len(metrics[t])}">{escape(task_name(t))}</th>' for t in tasks)
    names = "".join(
        f'<th scope="col"{_first(task, metric, metrics)}>'
        f"{escape(metric)}&nbsp;{_ARROWS[metric in _LOWER_IS_BETTER]}</th>"
        for task, metric in columns
    )
    if shares:
        head += '<th class="first">Share of topline</th>'
        names += '<th class="first"></th>'
    best = {column: _best(cells, systems, column) for column in columns}
    rows = []
    for system in systems:
        kind = ' class="topline"' if system == TOPLINE else ""
        row = f'<tr{kind}><th scope="row">{escape(system)}</th>'
        for column in columns:
            cell = cells.get((system, *column))
            row += _score_cell(cell, best[column] == system, _first(*column, metrics))
        row += f'<td class="shares first">{_shares(cells, system, columns)}</td>' if shares else ""
        rows.append(row + "</tr>")
    return (
        f'<div class="wide"><table class="scores"><thead><tr><th></th>{head}</tr><tr><th></th>{names}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _first(task: str, metric: str, metrics: dict[str, list[str]]) -> str:
    return ' class="first"' if metrics[task][0] == metric else ""


def _best(cells: dict[tuple[str, str, str], Result], systems: Sequence[str], column: tuple[str, str]) -> str:
    """The best system apart from the topline, where there are several."""
    rivals = [system for system in systems if system != TOPLINE and (system, *column) in cells]
    sign = 1 if column[1] in _LOWER_IS_BETTER else -1
    return min(rivals, key=lambda system: sign * cells[(system, *column)].value) if len(rivals) > 1 else ""


def _score_cell(cell: Result | None, best: bool, first: str) -> str:
    if cell is None:
        return f"<td{first}>\u2013</td>"
    digits, full = (2, 1.0) if cell.metric in (IN_LANGUAGE, "exact", "accuracy") else (1, 100.0)
    left, right = (100 * min(max(end / full, 0.0), 1.0) for end in (cell.low, cell.high))
    weight = ' class="best"' if best else ""
    return (
        f"<td{first}><span{weight}>{cell.value:.{digits}f}</span>"
        f"<small>{cell.low:.{digits}f}\u2013{cell.high:.{digits}f}</small>"
        f'<span class="range"><i style="left:{min(left, 97):.1f}%;width:{right - left:.1f}%"></i></span></td>'
    )


def _shares(cells: dict[tuple[str, str, str], Result], system: str, columns: Iterable[tuple[str, str]]) -> str:
    bars = []
    for task, metric in columns:
        ours, top = cells.get((system, task, metric)), cells.get((TOPLINE, task, metric))
        if system == TOPLINE or metric not in _SHARED or ours is None or top is None or top.value <= 0:
            continue
        share = 100 * ours.value / top.value
        name = f"{task[3:]} {metric}" if task.startswith("st-") else task_name(task)
        bar = f'<span class="range"><i style="left:0;width:{min(share, 100.0):.1f}%"></i></span>'
        bars.append(f'<span class="share"><span>{escape(name)}</span>{bar}<span>{share:.0f}%</span></span>')
    return "".join(bars)


def example_card(example: Example) -> str:
    """One utterance: its audio in a data URI, its text, and the answers under each prompt."""
    player = '<span class="note">no audio</span>'
    if example.audio is not None and example.audio.is_file():
        kind = {".flac": "audio/flac", ".wav": "audio/wav"}.get(example.audio.suffix.lower())
        kind = kind or mimetypes.guess_type(example.audio.name)[0] or "application/octet-stream"
        data = base64.b64encode(example.audio.read_bytes()).decode("ascii")
        player = f'<audio controls preload="metadata" src="data:{kind};base64,{data}"></audio>'
    asked: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
    for system, task, prompt, reference, hypothesis in example.rows:
        asked.setdefault((task, prompt, reference), []).append((system, hypothesis))
    rows = []
    for (task, prompt, reference), answers in asked.items():
        rows.append(f'<tr class="asked"><th>{escape(task_name(task))}</th><td dir="auto">{escape(prompt)}</td></tr>')
        rows.append(f'<tr class="truth"><th>reference</th><td dir="auto">{escape(reference)}</td></tr>')
        for system, hypothesis in answers:
            shown, same = difference(reference, hypothesis)
            tick = ' <span class="tick">\u2713</span>' if same else ""
            rows.append(f'<tr><th>{escape(system)}</th><td dir="auto">{shown}{tick}</td></tr>')
    return (
        f'<article class="example"><header><span class="note mono">{escape(example.id)} \u00b7 {escape(example.split)}'
        f'</span>{player}</header><p class="said" dir="auto">{escape(example.text)}</p>'
        f'<table class="answers"><tbody>{"".join(rows)}</tbody></table></article>'
    )


def place_name(split: str, prompts: str, groups: int) -> str:
    """How a split is called on the page, with the group of prompts where there are several."""
    return f"{split}, {prompts.replace('_', '-')} prompts" if groups > 1 else split


def mistakes(hypotheses: Sequence[Hypothesis]) -> str:
    """For each system, task, split and group the first answers whose words are not the reference's, folded away."""
    groups: dict[str, dict[tuple[str, str], list[Hypothesis]]] = {}
    num_groups = len({item.group for item in hypotheses})
    for item in hypotheses:
        task = f"st-{item.target_lang}" if item.task == "st" else item.task
        place = place_name(item.split, item.group, num_groups)
        groups.setdefault(item.system, {}).setdefault((task, place), []).append(item)
    parts = []
    for system, of_system in groups.items():
        inner, wrong_of_system = [], 0
        for (task, place), items in of_system.items():
            shown = [(item, *difference(item.reference, item.hypothesis)) for item in items]
            wrong = [(item, html) for item, html, same in shown if not same]
            wrong_of_system += len(wrong)
            title = f"{escape(task_name(task))}, {escape(place)}: {len(wrong)} of {len(items)} differ"
            rows = "".join(
                f'<tr><th class="mono">{escape(item.id)}</th><td dir="auto">{html}</td></tr>'
                for item, html in wrong[:_MISTAKES_SHOWN]
            )
            more = len(wrong) - _MISTAKES_SHOWN
            rest = f'<p class="note">and {more} more in hypotheses.jsonl</p>' if more > 0 else ""
            table = f'<table class="answers"><tbody>{rows}</tbody></table>{rest}'
            inner.append(f"<details><summary>{title}</summary>{table}</details>" if wrong else f"<p>{title}</p>")
        count = sum(map(len, of_system.values()))
        title = f"<b>{escape(system)}</b>: {wrong_of_system:,} of {count:,} answers differ"
        parts.append(f"<details><summary>{title}</summary>{''.join(inner)}</details>")
    return "".join(parts)
