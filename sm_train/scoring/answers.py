"""Every system's answers to every task about some utterances."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sm_train.data import shards
from sm_train.data.samples import FEATS, Samples
from sm_train.errors import UserError
from sm_train.models.llm import FrozenLlm
from sm_train.prompts import PromptSet, message_for
from sm_train.records import Task
from sm_train.runlog import clock
from sm_train.scoring.scores import Hypothesis
from sm_train.scoring.systems import Heard, System, ask


@dataclass(frozen=True, slots=True)
class Question:
    """A task with the prompt that was chosen for it."""

    ordinal: int
    split: str
    task: Task
    prompt: str
    message: str
    group: str
    """Of the paraphrases that the prompt is one of."""


class Utterances:
    """The utterances of some splits of a shard set, to be heard."""

    def __init__(self, shard_set: Path, splits: Sequence[str]) -> None:
        table = shards.read_table(shard_set, "utterances.parquet")
        self.samples = Samples(shard_set, table, FEATS)
        self.rows: list[dict[str, Any]] = [row for row in table.to_pylist() if row["split"] in splits]
        missing = sorted(set(splits) - {row["split"] for row in self.rows})
        if missing:
            raise UserError(f"shard set {shard_set} has no utterance in split {missing[0]!r}")
        self.by_id = {row["id"]: row for row in self.rows}

    def heard(self, ordinal: int, text: str) -> Heard:
        """Features, verified, and the reference."""
        return Heard(self.samples[ordinal]["feats"], text)


def questions_about(
    utterances: Utterances, tasks: Sequence[Task], prompts: PromptSet, groups: Sequence[str], seed: int,
    paraphrases: str = "one",
) -> list[Question]:  # fmt: skip
    """The tasks of these utterances, asked once with each group of prompts.

    ``paraphrases``: one of the group, chosen by (seed, utterance, task), or all of it.

    Raises:
        UserError: not one task is about any of them.
    """
    found = []
    for group in groups:
        for task in tasks:
            row = utterances.by_id.get(task.utterance_id)
            if row is None:
                continue
            chosen = prompts.of(task.task, group)
            if paraphrases == "one":
                chosen = [prompts.choose(task.task, group, seed, f"{task.utterance_id}/{task.target_lang}")]
            asked = (row["ordinal"], row["split"], task)
            found += [Question(*asked, prompt, message_for(prompt, task), group) for prompt in chosen]
    if not found:
        raise UserError("the instructions hold no task about the utterances of these splits")
    return found


def answer_all(
    systems: Sequence[System], llm: FrozenLlm, utterances: Utterances, questions: Sequence[Question],
    max_new_tokens: int, batch_size: int,
) -> list[Hypothesis]:  # fmt: skip
    """Hypotheses of every system, with the transcripts that some have without the LLM as systems of their own."""
    hypotheses: list[Hypothesis] = []
    start, total = time.monotonic(), len(systems) * len(questions)
    for number, system in enumerate(systems):
        heard = {row["ordinal"]: utterances.heard(row["ordinal"], row["text"]) for row in utterances.rows}
        vectors = {ordinal: system.vectors(h) for ordinal, h in heard.items()}
        answers: dict[int, str] = {}
        # Neighbours in length share a batch; the order of the output is that of the questions.
        order = sorted(range(len(questions)), key=lambda i: len(vectors[questions[i].ordinal]))
        for begin in range(0, len(order), batch_size):
            batch = order[begin : begin + batch_size]
            messages = [questions[i].message for i in batch]
            texts = ask(llm, messages, [vectors[questions[i].ordinal] for i in batch], max_new_tokens, system.adapter)
            answers.update(zip(batch, texts, strict=True))
            _show(system.name, number * len(questions) + len(answers), total, start)
        hypotheses += [_hypothesis(system.name, q, answers[i]) for i, q in enumerate(questions)]
        hypotheses += list(_transcripts(system, heard, questions))
    return hypotheses


def _hypothesis(system: str, question: Question, text: str) -> Hypothesis:
    task = question.task
    return Hypothesis(
        system, task.task, task.target_lang, question.split, question.ordinal, task.utterance_id, question.prompt,
        task.answer, text, question.group,
    )  # fmt: skip


def _transcripts(system: System, heard: Mapping[int, Heard], questions: Sequence[Question]) -> Iterator[Hypothesis]:
    for question in questions:
        if question.task.task == "asr":
            text = system.transcript(heard[question.ordinal])
            if text is not None:
                yield _hypothesis(f"{system.name}, no LLM", question, text)


def _show(name: str, done: int, total: int, start: float) -> None:
    if sys.stderr.isatty() or done == total or done % 1024 < 32:
        eta_s = (time.monotonic() - start) / done * (total - done)
        print(f"evaluate: {name}, {done} of {total} answers, ETA {clock(eta_s)}", file=sys.stderr, flush=True)
