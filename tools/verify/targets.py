"""A target set, checked: its parts and tables, its tokens against the utterances, its embedding and its tokenizer.

Shape letters: R rows of the table, L tokens, D LLM width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

from sm_train import config
from sm_train.data import shards
from sm_train.data.hashing import tensors_hash
from sm_train.data.instructions import TASKS
from sm_train.data.lengths import num_positions
from sm_train.data.samples import TOKENS
from sm_train.data.target_set import EMBEDDING, TABLE, TOKENIZER, UTTERANCES, require_covered
from tools.verify import MALFORMED, differing, digest_of, inside, reason, short
from tools.verify.parts import CheckSample, Part
from tools.verify.tables import Checked, check_inputs, check_parts, check_tables, read_dataset, some

REMEDY = "remove the target set's folder and build the targets anew"


def check_targets(
    shard_set: Path, name: str, utterances: Sequence[Mapping[str, Any]], jobs: int, advance: Callable[[Part], None],
) -> Checked:  # fmt: skip
    """Read every byte of one target set.

    Args:
        utterances: the shard set's table.
    """
    found = Checked(shard_set / "targets" / name, REMEDY)
    read_dataset(found)
    ids_R = _check_embedding(found) if found.dataset else None
    columns = found.dataset.get("columns") if isinstance(found.dataset.get("columns"), dict) else None
    check_parts(found, columns or TOKENS, check_tokens(utterances, ids_R), jobs, advance, REMEDY)
    if not found.dataset:
        return found
    check_tables(found, TABLE)
    if utterances:
        count = _check_coverage(found, shard_set)
        check_inputs(found, [str(row["id"]) for row in utterances[:count]], f"what it covers of {shard_set}")
    _check_tokenizer(found)
    _check_tasks(found, {str(row["id"]) for row in utterances})
    return found


def _check_coverage(found: Checked, shard_set: Path) -> int:
    """How many of the utterances it says it covers, which must be as they were."""
    try:
        covers = found.dataset["covers"]
        require_covered(covers, shards.read_table(shard_set, UTTERANCES), found.root)
        return int(covers["num_utterances"])
    except MALFORMED:
        found.wrong(shards.DATASET, "it is of another state of the shard set")
        return -1


def check_tokens(utterances: Sequence[Mapping[str, Any]], ids_R: NDArray[np.int32] | None) -> CheckSample:
    """A check of one utterance's tokens: as many as its row says, no more than positions, all in the embedding."""

    def check(row: Mapping[str, Any], sample: Mapping[str, Any]) -> str | None:
        tokens_L: NDArray[np.int32] = sample["tokens"]
        if tokens_L.shape != (row["num_tokens"],):
            return f"its tokens are of shape {tokens_L.shape}, not ({short(row['num_tokens'])},)"
        ordinal = row["utterance"]
        if not utterances:  # their table is not there, which was said
            return None
        if not 0 <= ordinal < len(utterances) or utterances[ordinal]["id"] != row["id"]:
            return f"utterance {short(ordinal)} of the shard set is another one"
        positions = num_positions(int(utterances[ordinal]["num_frames"]))
        if len(tokens_L) > positions:
            return f"{len(tokens_L)} tokens do not fit {positions} positions"
        strange = [] if ids_R is None else np.setdiff1d(tokens_L, ids_R).tolist()
        return f"its token {strange[0]} is not in {EMBEDDING}" if strange else None

    return check


def _check_embedding(found: Checked) -> NDArray[np.int32] | None:
    """The token ids of the table of embeddings, if it can be read."""
    dataset = found.dataset
    try:
        path = inside(found.root, EMBEDDING)
        tensors = load_file(path)
        ids_R, rows_RD = tensors["ids"], tensors["rows"]
        found.num_bytes += path.stat().st_size
        measured = {
            "embedding_hash": tensors_hash(tensors),
            "num_rows": len(rows_RD),
            "width": rows_RD.shape[1],
            "dtype": str(rows_RD.dtype).removeprefix("torch."),
        }
        for said in differing(measured, dataset, measured):
            found.wrong(EMBEDDING, f"{said} as in the file")
        ids: NDArray[np.int32] = ids_R.numpy()
        if ids.shape != (len(rows_RD),) or (np.diff(ids) <= 0).any():
            found.wrong(EMBEDDING, "its ids are not as many as its rows, or not in order")
        if dataset.get("pad_id") not in ids.tolist():
            found.wrong(EMBEDDING, f"the pad's id {short(dataset.get('pad_id'))} is not in it")
        if not torch.isfinite(rows_RD).all():
            found.wrong(EMBEDDING, "a number in it is NaN or infinite")
        return ids
    except (SafetensorError, *MALFORMED) as error:
        found.wrong(EMBEDDING, f"it cannot be read ({reason(error)})")
        return None


def _check_tokenizer(found: Checked) -> None:
    try:
        text = inside(found.root, TOKENIZER).read_text(encoding="utf-8")
        digest = config.fingerprint({"tokenizer": text})
        for said in differing({"tokenizer_hash": digest}, found.dataset, ["tokenizer_hash"]):
            found.wrong(TOKENIZER, f"{said} as in the file")
    except MALFORMED as error:
        found.wrong(TOKENIZER, f"it cannot be read ({reason(error)})")


def _check_tasks(found: Checked, ids: set[str]) -> None:
    """The tasks, if there are any; no hash of them is kept, so their form and ids alone are checked."""
    path = found.root / TASKS
    if not path.exists():
        return
    remedy = "write the tasks again with cluster.retarget"
    try:
        found.num_bytes += digest_of(inside(found.root, TASKS))[1]
        rows = shards.read_parquet(path).to_pylist()
        strangers = {str(row["id"]) for row in rows} - ids
        if strangers and ids:
            found.wrong(TASKS, f"{len(strangers)} ids are not in the shard set: {some(strangers)}", remedy)
        uneven = [row["id"] for row in rows if len(row["answer_ids"]) != row["num_answer_tokens"]]
        if uneven or not all(isinstance(json.loads(row["variables"]), dict) for row in rows):
            found.wrong(TASKS, f"answers or variables are not of their form: {some(uneven)}", remedy)
    except MALFORMED as error:
        found.wrong(TASKS, f"it cannot be read ({reason(error)})", remedy)
