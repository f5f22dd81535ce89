"""Tasks of a target set: instructions, their answers in one LLM's token ids."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sm_train import config
from sm_train.chat import Chat
from sm_train.data import manifest, shards
from sm_train.data.instructions import num_tasks, tasks_facts, write_tasks
from sm_train.data.mds import file_digest
from sm_train.data.target_set import UTTERANCES, TargetSet
from sm_train.errors import UserError
from sm_train.models import checkpoints
from sm_train.models.tokenizer import Tokenizer

_NAMED = 3


def build(shard_set: Path, name: str, instructions: Sequence[Path]) -> str:
    """Write ``targets/NAME/tasks.parquet``; one that came of the same files and chat template is left alone.

    Tasks about utterances in quarantine are left out and counted.

    Returns:
        What was done, for the terminal.

    Raises:
        UserError: an instruction is about an utterance that the set has never seen or that the target set does not
            cover, or the LLM's tokenizer is not the one that the targets came from.
    """
    targets = TargetSet(shard_set, name)
    llm, revision = targets.contract["llm"], targets.contract["llm_revision"]
    tokenizer = Tokenizer(checkpoints.resolve(llm, revision, "LLM"), targets.contract["pad_token"])
    tokenizer.require_same_as(targets)
    chat = Chat(tokenizer.inner)
    tasks = [task for path in instructions for task in manifest.read_instructions(path)]
    digests = [file_digest(path) for path in instructions]
    asked = {"files": digests, "targets": targets.contract["part_hashes"]}  # a set that was extended may take more
    facts = {"chat": chat.fingerprint, "instructions": config.fingerprint(asked)}
    if tasks_facts(targets.root) == facts:
        return "tasks complete"
    ids, ordinals = (targets.table.column(name).to_pylist() for name in ("id", "utterance"))
    ordinal_of = dict(zip(ids, ordinals, strict=True))
    quarantines = [shards.read_table(root, "quarantine.parquet") for root in (shard_set, targets.root)]
    known = {*ordinal_of, *(id for table in quarantines for id in table.column("id").to_pylist())}
    strangers = [task.utterance_id for task in tasks if task.utterance_id not in known]
    if strangers:
        _require_covered(targets, shard_set, strangers)
        named = ", ".join(map(repr, list(dict.fromkeys(strangers))[:_NAMED]))
        raise UserError(
            f"{len(strangers)} of {len(tasks)} instructions are about utterances that {shard_set} does not have, such "
            f"as {named}; mend the instructions, or name the shard set that they belong to"
        )
    distinct = {(t.utterance_id, t.task, t.target_lang, json.dumps(t.variables), t.answer) for t in tasks}
    if len(distinct) < len(tasks):
        raise UserError(f"{len(tasks) - len(distinct)} of {len(tasks)} instructions are there twice; give each once")
    kept = [task for task in tasks if task.utterance_id in ordinal_of]
    if not kept:
        raise UserError(f"no instruction is about a committed utterance of {shard_set}; nothing is written")
    answers = chat.answers([task.answer for task in kept])
    rows = [
        {
            "utterance": ordinal_of[task.utterance_id], "id": task.utterance_id, "task": task.task,
            "variables": json.dumps(task.variables, ensure_ascii=False), "target_lang": task.target_lang,
            "answer": task.answer, "answer_ids": ids, "num_answer_tokens": len(ids),
        }
        for task, ids in zip(kept, answers, strict=True)
    ]  # fmt: skip
    replaced = f"; they replace {num_tasks(targets.root)} tasks" if num_tasks(targets.root) else ""
    write_tasks(targets.root, rows, facts)
    counts = ", ".join(f"{count} {kind}" for kind, count in Counter(task.task for task in kept).items())
    num_left_out = len(tasks) - len(kept)
    skipped = f"; {num_left_out} left out, their utterances are in quarantine" if num_left_out else ""
    longest = max(map(len, answers))
    return f"{len(kept)} tasks ({counts}), answers of up to {longest} tokens{skipped}{replaced}"


def _require_covered(targets: TargetSet, shard_set: Path, strangers: Sequence[str]) -> None:
    ids = shards.read_table(shard_set, UTTERANCES).column("id").to_pylist()
    uncovered = {*strangers} & {*ids[targets.contract["covers"]["num_utterances"] :]}
    if uncovered:
        raise UserError(
            f"instructions are about {len(uncovered)} utterances that {targets.root} does not cover yet, such as "
            f"{min(uncovered)!r}; give --llm {targets.contract['llm']} to extend it"
        )
