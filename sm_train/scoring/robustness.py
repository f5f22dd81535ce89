"""How much the wording of a prompt matters, and whether the task that was asked is the one that is answered. Pure.

Shape letters: N hypotheses, P paraphrases, K sufficient statistics of a metric.

**Paraphrases.** The metric (WER, chrF, accuracy) of each paraphrase alone; their mean, sample standard deviation and
worst. The interval of the mean draws utterances, all paraphrases of one together; that of the worst is the interval of
the paraphrase that is worst here, so it leaves out that this one was picked for it.

**Answered task.** An utterance has references of several tasks: transcript, translations, answers. An answer is near a
reference by 1 - (character edits) / (characters of the longer one), both normalised. It counts as an answer to another
task where that task's nearest reference is near (:data:`NEAR`) and nearer than the asked task's by :data:`MARGIN`; as
one to the task asked where that one is near; else to none. Edits and not chrF: chrF calls a transcript near the short
answer that it contains.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sm_train import files
from sm_train.errors import UserError
from sm_train.scoring import scores
from sm_train.scoring.scores import Floats, Hypothesis

FILE = "robustness.json"
NEAR = 0.5
"""Unrelated sentences of the miniature are this near one another in less than 1 of 100 pairs, in any language."""
MARGIN = 0.1
NONE = "none"
"""An answer that is near to no reference."""
_METRICS = {"asr": "WER", "st": "chrF", "sqa": "accuracy"}


@dataclass(frozen=True, slots=True)
class Robustness:
    """One system on one task, split and group of prompts: an entry of robustness.json."""

    system: str
    task: str
    """asr | st-LANG | sqa"""
    split: str
    prompts: str
    """The group of paraphrases: train | held_out."""
    metric: str
    """WER (lower is better), chrF, accuracy."""
    count: int
    by_prompt: dict[str, float]
    """The metric of each paraphrase alone."""
    paired: bool
    """Every paraphrase was asked about the same utterances; else they differ in these too."""
    mean: float
    mean_low: float
    """Lower end of the 95% percentile bootstrap interval over utterances, as in results.json."""
    mean_high: float
    spread: float
    """Standard deviation over paraphrases (n - 1); 0 for a single one."""
    worst: float
    worst_low: float
    worst_high: float
    worst_prompt: str
    other_task: float | None
    """Share of answers to another task than asked; None where no utterance has a reference of another task."""
    other_task_low: float | None
    other_task_high: float | None
    answered: dict[str, int]
    """Answers by the task that they answer, ``none`` among them, over utterances with references of several tasks."""
    signature: str


def robustness(hypotheses: Sequence[Hypothesis], normaliser: str) -> list[Robustness]:
    """An entry for each (system, task, split, group of prompts), in the order in which these first occur.

    Raises:
        UserError: an unknown task or normaliser, or a reference with nothing left after it.
    """
    for item in hypotheses:
        if item.task not in _METRICS:
            raise UserError(f"{item.id}: unknown task {item.task!r}; known are: {', '.join(_METRICS)}")
    pairs = [scores.normal_pair(item, normaliser) for item in hypotheses]
    answered = answered_tasks(hypotheses, pairs)
    groups: dict[tuple[str, str, str, str], list[int]] = defaultdict(list)
    for number, item in enumerate(hypotheses):
        groups[item.system, label(item), item.split, item.group].append(number)
    entries = []
    for (system, task, split, prompts), numbers in groups.items():
        items = [hypotheses[i] for i in numbers]
        shares = _other_task(items, [answered[i] for i in numbers], task)
        wording = _wording(items, [pairs[i] for i in numbers], normaliser)
        entries.append(Robustness(system, task, split, prompts, *wording[:-1], *shares, wording[-1]))
    return entries


def label(item: Hypothesis) -> str:
    """asr | st-LANG | sqa"""
    return f"st-{item.target_lang}" if item.task == "st" else item.task


def _wording(
    items: Sequence[Hypothesis], pairs: Sequence[tuple[str, str]], normaliser: str
) -> tuple[str, int, dict[str, float], bool, float, float, float, float, float, float, float, str, str]:
    """The fields of :class:`Robustness` from ``metric`` to ``worst_prompt``, and the signature."""
    metric = _METRICS[items[0].task]
    stats_NK, compute, signature = scores.statistics(metric, items, pairs, normaliser, None)
    texts = list(dict.fromkeys(item.prompt for item in items))
    column = np.array([texts.index(item.prompt) for item in items])
    # Beside a paraphrase's statistics stands how many there are: a draw of utterances may leave it without any.
    wide_NPK = np.zeros((len(items), len(texts), stats_NK.shape[1] + 1))
    wide_NPK[np.arange(len(items)), column] = np.column_stack([stats_NK, np.ones(len(items))])
    shape, wide = wide_NPK.shape[1:], wide_NPK.reshape(len(items), -1)

    def values(sums: Floats) -> Floats:
        return np.array([compute(row[:-1]) if row[-1] else np.nan for row in sums.reshape(shape)])

    rows = scores.utterance_rows([item.id for item in items])
    of_each = values(wide.sum(axis=0))
    mean = scores.with_interval(wide, rows, lambda sums: float(np.nanmean(values(sums))))
    worst = int(of_each.argmax() if metric == "WER" else of_each.argmin())
    of_worst = column == worst
    worst_rows = scores.utterance_rows([item.id for item in items if item.prompt == texts[worst]])
    bounds = scores.with_interval(stats_NK[of_worst], worst_rows, compute)
    asked = Counter((item.id, item.prompt) for item in items)
    paired = len({frozenset((id, n) for (id, prompt), n in asked.items() if prompt == text) for text in texts}) == 1
    spread = float(of_each.std(ddof=1)) if len(texts) > 1 else 0.0
    by_prompt = dict(zip(texts, of_each.tolist(), strict=True))
    return metric, len(items), by_prompt, paired, *mean, spread, *bounds, texts[worst], signature


def answered_tasks(hypotheses: Sequence[Hypothesis], pairs: Sequence[tuple[str, str]]) -> list[str | None]:
    """The task that each hypothesis answers, by the rule above; None where its utterance has no other reference.

    ``pairs``: (reference, hypothesis) of each, normalised. References are those of all hypotheses in hand.
    """
    references: dict[tuple[str, str], dict[str, dict[str, None]]] = defaultdict(dict)
    for item, (reference, _) in zip(hypotheses, pairs, strict=True):
        references[item.split, item.id].setdefault(label(item), {})[reference] = None
    near: dict[tuple[str, str], float] = {}
    for item, (_, said) in zip(hypotheses, pairs, strict=True):
        near.update(((text, said), 0.0) for texts in references[item.split, item.id].values() for text in texts)
    if not near:
        return []
    errors = scores.error_counts(list(near), characters=True)[:, 0]
    lengths = np.array([max(map(len, pair)) for pair in near])
    near = dict(zip(near, (1 - errors / lengths).tolist(), strict=True))
    found: list[str | None] = []
    for item, (_, said) in zip(hypotheses, pairs, strict=True):
        of_task = {
            task: max(near[text, said] for text in texts) for task, texts in references[item.split, item.id].items()
        }
        own = of_task.pop(label(item))
        found.append(_answered(label(item), own, of_task) if of_task else None)
    return found


def _answered(asked: str, own: float, others: dict[str, float]) -> str:
    other = max(sorted(others), key=lambda task: others[task])
    if others[other] >= NEAR and others[other] > own + MARGIN:
        return other
    return asked if own >= NEAR else NONE


def _other_task(
    items: Sequence[Hypothesis], answered: Sequence[str | None], task: str
) -> tuple[float | None, float | None, float | None, dict[str, int]]:
    """(share of answers to another task, low, high, answers by task answered)."""
    told = [(item.id, to) for item, to in zip(items, answered, strict=True) if to is not None]
    if not told:
        return None, None, None, {}
    stats = np.array([[to not in (task, NONE), 1] for _, to in told], np.float64)
    share = scores.with_interval(stats, scores.utterance_rows([id for id, _ in told]), scores.share)
    return *share, dict(sorted(Counter(to for _, to in told).items()))


def table(entries: Sequence[Robustness]) -> str:
    """A row for each entry, aligned, for the terminal."""
    names = ["system", "split", "prompts", "task", "metric", "wordings", "mean", "spread", "worst", "other task"]
    lines = [names]
    for e in entries:
        digits = 3 if e.metric == "accuracy" else 1
        mean = f"{e.mean:.{digits}f} [{e.mean_low:.{digits}f}, {e.mean_high:.{digits}f}]"
        worst = f"{e.worst:.{digits}f} [{e.worst_low:.{digits}f}, {e.worst_high:.{digits}f}]"
        number = f"{len(e.by_prompt)}{'' if e.paired else '*'}"
        other = "-" if e.other_task is None else f"{100 * e.other_task:.1f}%"
        spread = f"{e.spread:.{digits}f}"
        lines.append([e.system, e.split, e.prompts, e.task, e.metric, number, mean, spread, worst, other])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    note = [] if all(e.paired for e in entries) else ["* each wording was asked about other utterances"]
    return "\n".join([*rows, *note])


def confusion(entries: Iterable[Robustness]) -> str:
    """Task asked (rows) by task answered (columns), summed over entries, for the terminal."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for entry in entries:
        counts[entry.task].update(entry.answered)
    tasks = sorted(counts)
    lines = [["asked", *tasks, NONE], *([task, *(str(counts[task][to]) for to in [*tasks, NONE])] for task in tasks)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def is_told(hypotheses: Iterable[Hypothesis]) -> bool:
    """Whether any question was asked in several wordings of one group."""
    wordings: dict[tuple[str, str, str, str, str, str], set[str]] = defaultdict(set)
    for item in hypotheses:
        key = (item.system, label(item), item.split, item.group, item.id, item.reference)
        wordings[key].add(item.prompt)
    return any(len(prompts) > 1 for prompts in wordings.values())


def write(path: Path, entries: Iterable[Robustness]) -> None:
    """robustness.json at ``path``, whole or not at all."""
    files.write_text(path, json.dumps([asdict(entry) for entry in entries], ensure_ascii=False, indent=1) + "\n")


def read(path: Path) -> list[Robustness]:
    """What :func:`write` wrote; nothing where there is no file.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return [Robustness(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else []
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: no readable figures ({error}); run the evaluation again") from None
