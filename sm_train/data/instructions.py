"""Instructions as training items: (utterance, task) pairs with their prompts and answers as token ids.

Shape letters: N items, B items of a micro-batch, L tokens of a row, A answer tokens.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from sm_train.chat import Chat
from sm_train.data import plan, shards
from sm_train.data.batches import Buffer, Columns, SpeechItems
from sm_train.data.lengths import num_positions
from sm_train.data.mds import file_digest
from sm_train.errors import UserError
from sm_train.prompts import PromptSet, message_for
from sm_train.records import PromptedBatch, Task

TASKS = "tasks.parquet"
SPLICES = ("all", "text")
IGNORED = -100
"""Where a row's answer asks for nothing."""


def write_tasks(target_set: Path, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, str]) -> None:
    """Write ``tasks.parquet`` of a target set, whole or not at all; ``facts`` go into its metadata."""
    table = pa.Table.from_pylist(list(rows)).replace_schema_metadata(dict(facts))
    shards.write_table(target_set / TASKS, table)


def tasks_facts(target_set: Path) -> dict[str, str]:
    """The facts that were written with a target set's tasks; empty if there are no tasks."""
    if not (target_set / TASKS).exists():
        return {}
    metadata = _read(target_set / TASKS).schema.metadata or {}
    return {name.decode(): value.decode() for name, value in metadata.items()}


def num_tasks(target_set: Path) -> int:
    """How many tasks a target set has."""
    return _read(target_set / TASKS).num_rows if (target_set / TASKS).exists() else 0


def mean_answer_tokens(target_set: Path, shares: Mapping[str, float]) -> float:
    """Mean tokens of an answer in a mixture of tasks, over all splits."""
    rows = _read(target_set / TASKS).select(["task", "target_lang", "num_answer_tokens"]).to_pylist()
    of_name = {
        name: [row["num_answer_tokens"] for row in rows if name in _groups_of(row["task"], row["target_lang"])]
        for name in shares
    }
    return float(sum(shares[name] * np.mean(of_name[name]) for name in shares) / sum(shares.values()))


@dataclass(frozen=True)
class Mixture:
    """Which tasks an epoch holds, how they are asked, and what an item costs."""

    weights: Mapping[str, float]
    """asr, st, st-LANGUAGE or sqa -> its share of the items, relative to the others'."""
    prompts: PromptSet
    group: str
    """The paraphrases: train | held_out."""
    unit: str
    """What a budget counts: tokens of the LLM, or samples."""
    max_answer_tokens: int
    seed: int
    splice: str = "all"
    """What stands in the prompt: all positions | text, as many positions as the transcript has tokens."""


class InstructionItems:
    """The tasks about some utterances, of the kinds that a mixture names.

    Raises:
        UserError: the target set has no tasks or they were made for another chat template, a kind of task is not among
            them, an answer is too long, or a prompt lacks a variable.
    """

    def __init__(self, speech: SpeechItems, chat: Chat, mixture: Mixture) -> None:
        self.speech, self.chat, self.mixture, self.unit = speech, chat, mixture, mixture.unit
        self.root = speech.targets.root
        self._require_tasks()
        table = _read(self.root / TASKS)
        item_of = np.full(len(speech.utterances), -1)
        item_of[speech.ordinals] = np.arange(len(speech))
        of_row = item_of[table.column("utterance").to_numpy()]
        kinds = list(zip(table.column("task").to_pylist(), table.column("target_lang").to_pylist(), strict=True))
        wanted = [i for i in np.flatnonzero(of_row >= 0) if _groups_of(*kinds[i]) & set(mixture.weights)]
        self.groups = self._groups([kinds[i] for i in wanted], [kinds[i] for i in np.flatnonzero(of_row >= 0)])
        self.speech_items: NDArray[np.int64] = of_row[wanted]
        rows = table.take(wanted).to_pylist()
        self.answers: list[list[int]] = [row["answer_ids"] for row in rows]
        self.tasks = [_task(row) for row in rows]
        self.ids = [f"{task.utterance_id} ({task.task}-{task.target_lang})" for task in self.tasks]
        sizes = np.array([len(answer) for answer in self.answers], np.int64)
        self._require_short(sizes)
        of_speech = {name: column[self.speech_items] for name, column in speech.columns.items()}
        self.columns: Columns = {**of_speech, "num_answer_tokens": sizes}
        self.duration_s = speech.duration_s[self.speech_items]
        longest_rows = self._longest_rows()  # also proves that every wording's variables are there
        self.lengths = np.ones_like(sizes) if self.unit == "samples" else longest_rows
        self.longest_row = int(longest_rows.max())
        """Tokens of the LLM."""

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def shard_of(self) -> NDArray[np.int64] | None:
        """The shard that each item's utterance lies in [N]; None for a local set."""
        of_speech = self.speech.shard_of
        return None if of_speech is None else of_speech[self.speech_items]

    def of_epoch(self, epoch: int) -> NDArray[np.int64]:
        """The items of an epoch, in the shares of the mixture."""
        weights = self.mixture.weights
        return plan.mix(list(self.groups.values()), [weights[name] for name in self.groups], self.mixture.seed, epoch)

    def messages(self, item: int) -> list[str]:
        """Every wording of an item's prompt, its variables filled."""
        task = self.tasks[item]
        try:
            return [message_for(prompt, task) for prompt in self.mixture.prompts.of(task.task, self.mixture.group)]
        except UserError as error:
            raise UserError(f"instruction of {self.ids[item]}: {error}") from None

    def message(self, item: int, epoch: int) -> str:
        """The wording that an item has in an epoch, by a hash of (seed, epoch, item)."""
        task, mixture = self.tasks[item], self.mixture
        name = f"{epoch}/{task.utterance_id}/{task.target_lang}"
        return message_for(mixture.prompts.choose(task.task, mixture.group, mixture.seed, name), task)

    def collate(self, items: NDArray[np.int64], epoch: int, buffer: Buffer | None = None) -> PromptedBatch:
        """Read, verify and pad some items; features lie in ``buffer`` until it is used again."""
        speech = self.speech.collate(self.speech_items[items], epoch, buffer)
        positions = self._spoken[items]
        halves = [self.chat.halves(self.message(int(i), epoch)) for i in items]
        answers = [self.answers[i] for i in items]
        rows = [
            [*prefix, *[self.chat.end_id] * int(count), *suffix, *answer[:-1]]
            for (prefix, suffix), count, answer in zip(halves, positions, answers, strict=True)
        ]
        longest, longest_answer = max(map(len, rows)), max(map(len, answers))
        ids_BL = np.full((len(rows), longest), self.chat.end_id, np.int64)
        is_real_BL, is_speech_BL = (np.zeros((len(rows), longest), bool) for _ in range(2))
        answers_BA = np.full((len(rows), longest_answer), IGNORED, np.int64)
        for b, (row, (prefix, _), answer) in enumerate(zip(rows, halves, answers, strict=True)):
            first = longest - len(row)
            ids_BL[b, first:], is_real_BL[b, first:] = row, True
            is_speech_BL[b, first + len(prefix) : first + len(prefix) + int(positions[b])] = True
            answers_BA[b, longest_answer - len(answer) :] = answer
        tensors = (torch.from_numpy(array) for array in (ids_BL, is_speech_BL, is_real_BL, answers_BA))
        return PromptedBatch(speech, *tensors)

    def _longest_rows(self) -> NDArray[np.int64]:
        """Tokens of each item under its longest wording [N], so that a plan holds in every epoch."""
        around = [max(sum(map(len, self.chat.halves(m))) for m in self.messages(i)) for i in range(len(self))]
        return np.array(around, np.int64) + self._spoken + self.columns["num_answer_tokens"] - 1

    @functools.cached_property
    def _spoken(self) -> NDArray[np.int64]:
        """Positions that stand in each item's prompt [N]."""
        positions = num_positions(self.columns["num_frames"])
        return positions if self.mixture.splice == "all" else np.minimum(self.columns["num_tokens"], positions)

    def _groups(
        self, kinds: Sequence[tuple[str, str]], all_kinds: Sequence[tuple[str, str]]
    ) -> dict[str, NDArray[np.int64]]:
        """Items by name of the mixture, in the order of names: the mixture's own order must change nothing."""
        groups = {}
        for name in sorted(self.mixture.weights):
            groups[name] = np.flatnonzero([name in _groups_of(*kind) for kind in kinds])
            if not len(groups[name]):
                have = sorted({group for kind in all_kinds for group in _groups_of(*kind)})
                raise UserError(
                    f"target set {self.root} has no task {name!r} about utterances of {', '.join(self.speech.splits)}; "
                    f"it has: {', '.join(have) or 'none'}"
                )
        if sum(map(len, groups.values())) > len(kinds):
            raise UserError(f"the tasks {', '.join(groups)} overlap; name st or its languages, not both")
        return groups

    def _require_tasks(self) -> None:
        facts = tasks_facts(self.root)
        command = f"python -m cluster.retarget {self.root.parent.parent} --name {self.root.name} --instructions FILE"
        if not facts:
            raise UserError(f"target set {self.root} has no tasks; write them: {command}")
        if facts["chat"] != self.chat.fingerprint:
            raise UserError(
                f"target set {self.root}: its tasks were written for another chat template ({facts['chat']}) than this "
                f"LLM's ({self.chat.fingerprint}); name that LLM, or write them again: {command}"
            )

    def _require_short(self, sizes: NDArray[np.int64]) -> None:
        limit, longest = self.mixture.max_answer_tokens, int(sizes.argmax())
        if sizes[longest] > limit:
            raise UserError(
                f"{int((sizes > limit).sum())} answers have more than max_answer_tokens {limit}; the longest, of "
                f"{self.ids[longest]}, has {int(sizes[longest])}: raise max_answer_tokens or leave them out"
            )

    @property
    def largest_id(self) -> int:
        """The largest token id in any wording or answer."""
        halves = [half for i in range(len(self)) for m in self.messages(i) for half in self.chat.halves(m)]
        return max(max(ids, default=0) for ids in [*halves, *self.answers])

    @property
    def kinds(self) -> list[str]:
        """asr, st, sqa: what occurs among the items."""
        return sorted({task.task for task in self.tasks})

    @property
    def digest(self) -> str:
        """A hash of the tasks' file."""
        return file_digest(self.root / TASKS)


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} cannot be read ({reason}); remove it and write it again with cluster.retarget"
        ) from None


def _groups_of(task: str, language: str) -> set[str]:
    return {task, f"{task}-{language}"} if task == "st" else {task}


def _task(row: Mapping[str, Any]) -> Task:
    return Task(row["id"], row["task"], json.loads(row["variables"]), row["target_lang"], row["answer"])
