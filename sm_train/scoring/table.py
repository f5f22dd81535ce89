"""The scores of an evaluation, as files and as plain tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sm_train.data.mds import file_digest
from sm_train.scoring import robustness, scores
from sm_train.scoring.language import Languages
from sm_train.scoring.scores import IN_LANGUAGE, Hypothesis, Result

HYPOTHESES = "hypotheses.jsonl"
_OF_HYPOTHESES = ("judged.json", "comet.json")


def table(results: Sequence[Result]) -> str:
    """A row for each system, split and group of prompts (named where there are two), the main metrics as columns."""
    languages = list(dict.fromkeys(result.task for result in results if result.task.startswith("st-")))
    columns = [("asr", "WER", "ASR WER")]
    columns += [
        (task, metric, f"{task[3:]} {metric}") for metric in ("chrF", IN_LANGUAGE, "BLEU") for task in languages
    ]
    columns += [("sqa", "accuracy", "SQA accuracy")]
    values = {(r.system, r.split, r.prompts, r.task, r.metric): r.value for r in results}
    present = {(r.task, r.metric) for r in results}
    columns = [column for column in columns if column[:2] in present]
    named = 3 if len({r.prompts for r in results}) > 1 else 2
    lines = [[*("system", "split", "prompts")[:named], *(title for *_, title in columns)]]
    for row in dict.fromkeys((r.system, r.split, r.prompts) for r in results):
        cells = [values.get((*row, task, metric)) for task, metric, _ in columns]
        digits = [2 if metric in ("accuracy", IN_LANGUAGE) else 1 for _, metric, _ in columns]
        shown = ["-" if cell is None else f"{cell:.{n}f}" for cell, n in zip(cells, digits, strict=True)]
        lines.append([*row[:named], *shown])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = []
    for line in lines:
        names = [cell.ljust(width) for cell, width in zip(line[:named], widths[:named], strict=True)]
        rows.append(
            "  ".join(names + [cell.rjust(width) for cell, width in zip(line[named:], widths[named:], strict=True)])
        )
    return "\n".join(row.rstrip() for row in rows)


def write(folder: Path, hypotheses: Sequence[Hypothesis], normaliser: str, languages: Languages | None) -> None:
    """hypotheses.jsonl, results.json, and robustness.json where it says something.

    What a judge or COMET said of other hypotheses goes.
    """
    said = folder / HYPOTHESES
    before = file_digest(said) if said.exists() else ""
    scores.write_hypotheses(said, hypotheses)
    for name in _OF_HYPOTHESES if file_digest(said) != before else ():
        (folder / name).unlink(missing_ok=True)
    scores.write_results(folder / "results.json", scores.score(hypotheses, normaliser, languages))
    (folder / robustness.FILE).unlink(missing_ok=True)
    if robustness.is_told(hypotheses):
        robustness.write(folder / robustness.FILE, robustness.robustness(hypotheses, normaliser))


def show(folder: Path) -> None:
    """Print what :func:`write` wrote."""
    print(table(scores.read_results(folder / "results.json")))
    if wordings := robustness.read(folder / robustness.FILE):
        print(f"\nby wording of the prompt:\n{robustness.table(wordings)}")
