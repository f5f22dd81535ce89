"""Every system's answers to every task about some utterances."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
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
from sm_train.scoring.kept import Answered, Kept, Work
from sm_train.scoring.scores import Hypothesis
from sm_train.scoring.systems import Heard, System, ask

_SHOWN_EVERY_S = 20.0
_BATCHES = 4
"""Of a piece: enough to have batches of one kind of answer, few enough to lose little of an interrupted run."""


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
        self.texts: dict[int, str] = {row["ordinal"]: row["text"] for row in self.rows}

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


Piece = list[list[int]]
"""Some batches of questions, by their numbers: what one rank answers at a time."""


def cut(utterances: Utterances, questions: Sequence[Question], batch_size: int) -> list[Piece]:
    """Pieces of neighbours in length, with all questions about an utterance; in their batches answers of one kind.

    They follow from table and questions alone: the same for every system and any number of ranks.
    """
    frames = {row["ordinal"]: row["num_frames"] for row in utterances.rows}

    def by_kind(number: int) -> tuple[str, str]:
        return questions[number].task.task, questions[number].task.target_lang

    order = sorted(range(len(questions)), key=lambda i: (frames[questions[i].ordinal], questions[i].ordinal, i))
    size = batch_size * _BATCHES
    pieces = [sorted(order[begin : begin + size], key=by_kind) for begin in range(0, len(order), size)]
    return [[piece[begin : begin + batch_size] for begin in range(0, len(piece), batch_size)] for piece in pieces]


def answer_all(
    systems: Sequence[System], llm: FrozenLlm, utterances: Utterances, questions: Sequence[Question],
    max_new_tokens: int, batch_size: int, kept: Kept, ranks: tuple[int, int] = (0, 1),
) -> None:  # fmt: skip
    """Let every system answer this rank's pieces, unless they are kept from before; ``ranks``: (rank, how many)."""
    rank, world_size = ranks
    pieces, there = cut(utterances, questions, batch_size), kept.read()
    numbered = [(s, p) for s in range(len(systems)) for p in range(len(pieces))]
    mine = [key for key in numbered[rank::world_size] if key not in there]
    progress = Progress(sum(len(batch) for _, p in mine for batch in pieces[p]), rank)
    if rank == 0 and len(mine) < len(numbered[::world_size]):
        progress.say(f"going on from {len(there)} of {len(numbered)} pieces")
    for s, p in mine:
        batches = [[questions[i] for i in batch] for batch in pieces[p]]
        kept.add(s, p, _answered(systems[s], llm, utterances, batches, max_new_tokens, progress))
    kept.close()


def _answered(
    system: System, llm: FrozenLlm, utterances: Utterances, batches: Sequence[Sequence[Question]], max_new_tokens: int,
    progress: Progress,
) -> Answered:  # fmt: skip
    start, read, wrote = time.perf_counter(), llm.tokens_read, llm.tokens_written
    questions = [question for batch in batches for question in batch]
    heard = {n: utterances.heard(n, utterances.texts[n]) for n in dict.fromkeys(q.ordinal for q in questions)}
    vectors = {ordinal: system.vectors(one) for ordinal, one in heard.items()}
    asr = dict.fromkeys(q.ordinal for q in questions if q.task.task == "asr")
    said = {ordinal: system.transcript(heard[ordinal]) for ordinal in asr}
    mapped = time.perf_counter()
    progress.map(system.name, len(heard))
    texts: list[str] = []
    for batch in batches:
        heard_vectors = [vectors[q.ordinal] for q in batch]
        texts += ask(llm, [q.message for q in batch], heard_vectors, max_new_tokens, system.adapter)
        progress.add(system.name, len(batch))
    positions = sum(len(vectors[q.ordinal]) for q in questions)
    tokens = (llm.tokens_read - read, positions, llm.tokens_written - wrote)
    work = Work(*tokens, mapped - start, time.perf_counter() - mapped)
    return Answered(texts, [said[q.ordinal] if q.task.task == "asr" else None for q in questions], work)


def merge(
    systems: Sequence[System], utterances: Utterances, questions: Sequence[Question], batch_size: int, kept: Kept
) -> tuple[list[Hypothesis], dict[str, Work]]:
    """What all ranks have answered: hypotheses by system and question, and what each system's answers took.

    Transcripts that a system has without the LLM count as a system of their own.

    Raises:
        UserError: answers are missing, as where the ranks share no file system.
    """
    pieces = cut(utterances, questions, batch_size)
    answered = kept.read_all({(s, p) for s in range(len(systems)) for p in range(len(pieces))})
    hypotheses: list[Hypothesis] = []
    work: dict[str, Work] = {}
    for s, system in enumerate(systems):
        said: dict[int, tuple[str, str | None]] = {}
        for p, piece in enumerate(pieces):
            one = answered[s, p]
            numbers = [number for batch in piece for number in batch]
            said.update(zip(numbers, zip(one.texts, one.transcripts, strict=True), strict=True))
            work[system.name] = work.get(system.name, Work()) + one.work
        alone = f"{system.name}, no LLM"
        hypotheses += [_hypothesis(system.name, q, said[i][0]) for i, q in enumerate(questions)]
        hypotheses += [_hypothesis(alone, q, t) for i, q in enumerate(questions) if (t := said[i][1]) is not None]
    return hypotheses, work


def _hypothesis(system: str, question: Question, text: str) -> Hypothesis:
    task = question.task
    return Hypothesis(
        system, task.task, task.target_lang, question.split, question.ordinal, task.utterance_id, question.prompt,
        task.answer, text, question.group,
    )  # fmt: skip


class Progress:
    """Lines on what rank 0 has done: each system's first vectors, the first batch, then every so often, the end."""

    def __init__(self, total: int, rank: int) -> None:
        self.total, self.rank, self.done = total, rank, 0
        self.start = self.shown = time.monotonic()
        self.mapping = ""

    def map(self, system: str, count: int) -> None:
        """Say that a system's first utterances have their vectors."""
        if self.rank == 0 and system != self.mapping:
            self.mapping = system
            self.say(f"{system}, the first {count} utterances mapped, decoding")

    def add(self, system: str, count: int) -> None:
        """Count some answers of a system."""
        is_first, now = self.done == 0, time.monotonic()
        self.done += count
        if self.rank == 0 and (is_first or self.done == self.total or now - self.shown >= _SHOWN_EVERY_S):
            self.shown = now
            eta_s = (now - self.start) / self.done * (self.total - self.done)
            self.say(f"{system}, {self.done} of {self.total} answers, ETA {clock(eta_s)}")

    def say(self, text: str) -> None:
        """A line beside the results."""
        print(f"evaluate: {text}", file=sys.stderr, flush=True)
