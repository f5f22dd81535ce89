"""Scores of hypotheses: pure functions from texts to numbers with 95% intervals, and the two files that hold them.

Shape letters: U utterances, K sufficient statistics of a metric.

Every metric here is a function of sums over utterances (errors and words; n-gram matches and totals), so an interval
needs no text a second time: utterances are drawn with replacement, their statistics summed, the metric computed on each
sum. An utterance asked twice (two questions, two prompts) is drawn as one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import jiwer
import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from sm_train import files
from sm_train.data.text import normalise
from sm_train.errors import UserError
from sm_train.scoring.language import Languages, is_in

RESAMPLES = 1000
SEED = 20417
IN_LANGUAGE = "in language"
"""The share of answers in the language asked for, right or wrong."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Record:
    """To and from the dictionary that is one JSON object of a file."""

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From such a dictionary; keys beyond the fields are ignored, a missing or wrong one is a :class:`UserError`.

        A field with a default is newer than some files are: there the default stands.
        """
        missing = [field.name for field in fields(cls) if field.name not in values and field.default is MISSING]
        if missing:
            raise UserError(f"a {cls.__name__.lower()} lacks {', '.join(missing)}: it has {sorted(values)}")
        texts = [field.name for field in fields(cls) if field.type == "str" and field.name in values]
        if wrong := [name for name in texts if not isinstance(values[name], str)]:
            raise UserError(f"a {cls.__name__.lower()} has {wrong[0]} {values[wrong[0]]!r}, which is no text")
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})


@dataclass(frozen=True, slots=True)
class Hypothesis(_Record):
    """What one system answered to one task on one utterance: a line of hypotheses.jsonl."""

    system: str
    task: str
    """asr | st | sqa"""
    target_lang: str
    split: str
    ordinal: int
    id: str
    prompt: str
    """As the model was asked, ``{speech}`` left as a placeholder."""
    reference: str
    hypothesis: str
    group: str = "train"
    """Of the paraphrases that the prompt is one of: train | held_out."""


@dataclass(frozen=True, slots=True)
class Result(_Record):
    """One metric of one system on one task and split: an entry of results.json."""

    system: str
    task: str
    """asr | st-LANG | sqa"""
    metric: str
    """WER, CER (percent, lower is better), BLEU, chrF (0 to 100), in language, exact, accuracy (0 to 1)."""
    value: float
    low: float
    """Lower end of the 95% percentile bootstrap interval over utterances."""
    high: float
    count: int
    """Hypotheses scored; utterances may be fewer."""
    split: str
    signature: str
    prompts: str = "train"
    """The group of paraphrases that was asked with: train | held_out."""


def score(hypotheses: Sequence[Hypothesis], normaliser: str, languages: Languages | None = None) -> list[Result]:
    """All metrics of each (system, task, split, group of prompts), in the order in which these first occur.

    ``normaliser`` holds for WER, CER, exact and accuracy; all else sees the texts as they are. ``languages`` tells
    which answers are in the asked-for language; None leaves that metric out.
    Raises :class:`UserError` for an unknown task or normaliser and for a reference with nothing left after it.
    """
    groups: dict[tuple[str, str, str, str], list[Hypothesis]] = {}
    for item in hypotheses:
        if item.task not in _METRICS:
            raise UserError(f"{item.id}: unknown task {item.task!r}; known are: {', '.join(_METRICS)}")
        task = f"st-{item.target_lang}" if item.task == "st" else item.task
        groups.setdefault((item.system, task, item.split, item.group), []).append(item)
    results = []
    for (system, task, split, prompts), items in groups.items():
        pairs = [normal_pair(item, normaliser) for item in items]
        rows = utterance_rows([item.id for item in items])
        for metric in _METRICS[items[0].task]:
            if metric == IN_LANGUAGE and languages is None:
                continue
            stats, compute, signature = statistics(metric, items, pairs, normaliser, languages)
            value, low, high = with_interval(stats, rows, compute)
            results.append(Result(system, task, metric, value, low, high, len(items), split, signature, prompts))
    return results


_METRICS = {"asr": ("WER", "CER", "exact"), "st": ("BLEU", "chrF", IN_LANGUAGE, "exact"), "sqa": ("accuracy",)}


def normal_pair(item: Hypothesis, normaliser: str) -> tuple[str, str]:
    """(reference, hypothesis), normalised."""
    reference = normalise(item.reference, normaliser).strip()
    if not reference:
        raise UserError(
            f"{item.id}: the reference {item.reference!r} ({item.task}, {item.split}) is empty after normaliser "
            f"{normaliser!r}; correct it in the manifest or instructions, or leave it out of the evaluation"
        )
    return " ".join(reference.split()), " ".join(normalise(item.hypothesis, normaliser).split())


def _without_article(text: str) -> str:
    first, _, rest = text.partition(" ")
    return rest if rest and first.lower() in {"a", "an", "the"} else text


def utterance_rows(ids: Sequence[str]) -> NDArray[np.intp]:
    """For each hypothesis the row of its utterance, in the sorted order of ids: equal for all systems on a split."""
    rows: NDArray[np.intp] = np.unique(np.asarray(ids), return_inverse=True)[1]
    return rows


def statistics(
    metric: str, items: Sequence[Hypothesis], pairs: Sequence[tuple[str, str]], normaliser: str,
    languages: Languages | None,
) -> tuple[Floats, Callable[[Floats], float], str]:  # fmt: skip
    """(statistics of each hypothesis [., K], the metric of their sum [K], signature)."""
    ours = f"normaliser:{normaliser}|bootstrap:{RESAMPLES}|seed:{SEED}"
    if metric in ("BLEU", "chrF"):
        sacre: Any = BLEU(trg_lang=items[0].target_lang) if metric == "BLEU" else CHRF()
        # sacrebleu offers a percentile interval nowhere in public; these two are what its own bootstrap is made of.
        stats = sacre._extract_corpus_statistics([i.hypothesis for i in items], [[i.reference for i in items]])
        signature = f"{metric}|{sacre.get_signature()}|bootstrap:{RESAMPLES}|seed:{SEED}"
        return np.array(stats, np.float64), lambda sums: float(sacre._compute_score_from_stats(sums).score), signature
    if metric in ("WER", "CER"):
        signature = f"{metric}|jiwer:{version('jiwer')}|{ours}"
        return error_counts(pairs, characters=metric == "CER"), lambda sums: float(100 * sums[0] / sums[1]), signature
    if metric == IN_LANGUAGE and languages:
        right = np.array([[is_in(languages, i.hypothesis, i.target_lang), 1] for i in items], np.float64)
        return right, share, f"{metric}|{languages.signature}|bootstrap:{RESAMPLES}|seed:{SEED}"
    if metric == "accuracy":
        pairs = [(_without_article(reference), _without_article(hypothesis)) for reference, hypothesis in pairs]
        ours = f"exact match without a leading a, an or the|{ours}"
    right = np.array([[reference == hypothesis, 1] for reference, hypothesis in pairs], np.float64)
    return right, share, f"{metric}|{ours}"


def share(sums: Floats) -> float:
    """The first sum in the second."""
    return float(sums[0] / sums[1])


def error_counts(pairs: Sequence[tuple[str, str]], *, characters: bool) -> Floats:
    """(errors, length of the reference) of each pair, in words or in characters (spaces count): [., 2]."""
    references, hypotheses = [list(texts) for texts in zip(*pairs, strict=True)]
    aligned = (jiwer.process_characters if characters else jiwer.process_words)(references, hypotheses)
    counts = []
    for reference, chunks in zip(aligned.references, aligned.alignments, strict=True):
        # A substitution is as long on both sides, an insertion or deletion has length on one.
        errors = sum(
            max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
            for chunk in chunks
            if chunk.type != "equal"
        )
        counts.append((errors, len(reference)))
    return np.array(counts, np.float64)


def with_interval(
    stats: Floats, rows: NDArray[np.intp], compute: Callable[[Floats], float]
) -> tuple[float, float, float]:
    """(value, low, high) of a metric: 95% percentile bootstrap over utterances, equal draws for equal U."""
    stats_UK, draw = _by_utterance(stats, rows), np.random.default_rng(SEED)
    num_utterances = len(stats_UK)
    draws = (draw.integers(num_utterances, size=num_utterances) for _ in range(RESAMPLES))
    values = [compute(np.bincount(drawn, minlength=num_utterances) @ stats_UK) for drawn in draws]
    low, high = np.percentile(values, [2.5, 97.5])
    return compute(stats_UK.sum(axis=0)), float(low), float(high)


def _by_utterance(stats: Floats, rows: NDArray[np.intp]) -> Floats:
    stats_UK = np.zeros((int(rows.max()) + 1, stats.shape[1]))
    np.add.at(stats_UK, rows, stats)
    return stats_UK


def utterance_sums(
    items: Sequence[Hypothesis], metric: str, normaliser: str, languages: Languages | None
) -> tuple[list[str], Floats, Callable[[Floats], float]]:
    """For a bootstrap of one's own: sorted ids of utterances, their statistics [U, K], the metric of a sum of these."""
    pairs, ids = [normal_pair(item, normaliser) for item in items], [item.id for item in items]
    stats, compute, _ = statistics(metric, items, pairs, normaliser, languages)
    return sorted(set(ids)), _by_utterance(stats, utterance_rows(ids)), compute


def write_results(path: Path, results: Iterable[Result]) -> None:
    """results.json at ``path``, whole or not at all."""
    files.write_text(path, json.dumps([result.to_dict() for result in results], ensure_ascii=False, indent=1) + "\n")


def write_hypotheses(path: Path, hypotheses: Iterable[Hypothesis]) -> None:
    """hypotheses.jsonl at ``path``, whole or not at all."""
    files.write_text(path, "".join(json.dumps(item.to_dict(), ensure_ascii=False) + "\n" for item in hypotheses))


def read_results(path: Path) -> list[Result]:
    """What :func:`write_results` wrote. Raises :class:`UserError` where the file is missing or not such a list."""
    try:
        return [Result.from_dict(values) for values in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, UserError) as error:
        raise UserError(f"{path}: no readable results ({error}); run the evaluation first") from None


def read_hypotheses(path: Path) -> list[Hypothesis]:
    """What :func:`write_hypotheses` wrote. Raises :class:`UserError` where the file is missing or malformed."""
    try:
        # Not splitlines(): a text may hold U+2028, which JSON leaves as it is.
        lines = path.read_text(encoding="utf-8").split("\n")
        return [Hypothesis.from_dict(json.loads(line)) for line in lines if line.strip()]
    except (OSError, ValueError, TypeError, UserError) as error:
        raise UserError(f"{path}: no readable hypotheses ({error}); run the evaluation first") from None
