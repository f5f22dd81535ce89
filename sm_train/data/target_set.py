"""A target set, read: token ids by utterance, and the rows of one LLM's input embedding that they use.

It covers the first utterances of its shard set, all of them unless the shard set has grown since.
Shape letters: R rows of the table, L tokens, D LLM width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tokenizers
import torch
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

from sm_train import files
from sm_train.data import arrival, shards
from sm_train.data.hashing import tensors_hash
from sm_train.data.samples import TOKENS, Samples
from sm_train.errors import UserError
from sm_train.runlog import say

UTTERANCES = "utterances.parquet"
TABLE = "tokens.parquet"
EMBEDDING = "embedding.safetensors"
TOKENIZER = "tokenizer.json"
SAME_LLM = ("llm", "llm_revision", "tokenizer_hash", "pad_id", "normaliser")


def utterances_hash(utterances: pa.Table) -> str:
    """The xxh3 of what targets follow from: every utterance's id, the hash of its features, and its text, in order."""
    hasher = xxhash.xxh3_64()
    for name in ("id", "xxh3", "text"):
        column = utterances.column(name)
        hasher.update(pc.binary_length(column).to_numpy().astype("<i4"))
        for batch in column.chunks:
            hasher.update("".join(batch.to_pylist()).encode())
    return str(hasher.hexdigest())


def cover(shard_set: Path, utterances: pa.Table) -> dict[str, Any]:
    """What a target set says that it covers, if it covers all utterances that its shard set has now."""
    num_parts = files.read_json(shard_set / shards.DATASET)["num_parts"]
    hashed = utterances_hash(utterances)
    return {"num_utterances": len(utterances), "num_parts": num_parts, "utterances_hash": hashed}


def require_covered(covers: Mapping[str, Any], utterances: pa.Table, root: Path) -> None:
    """Raises UserError unless what a target set covers is the unchanged beginning of a shard set's utterances."""
    first = utterances.slice(0, covers["num_utterances"])
    wanted = {"num_utterances": len(first), "utterances_hash": utterances_hash(first)}
    found = {name: covers[name] for name in wanted}
    remedy = f"the shard set has changed: remove {root} and build the targets anew"
    shards.require_same(wanted, found, str(root), remedy)


def stored_tokens(root: Path, parts: Sequence[str], columns: Mapping[str, str]) -> Iterator[NDArray[np.int32]]:
    """The token ids of every sample of some committed parts, verified; the set need not be complete.

    Raises:
        UserError: there is no sample in any of them.
    """
    rows = [{**row, "part": part} for part in parts for row in shards.read_part(root, part)["rows"]]
    if not rows:
        raise UserError(f"target set {root}: not one transcript fits its utterance; see the quarantine of its parts")
    with Samples(root, pa.Table.from_pylist(rows), columns) as samples:
        for row in range(len(samples)):
            yield samples[row]["tokens"]


class TargetTable:
    """Rows of one LLM's input embedding by token id, and the contract that says where they come from."""

    def __init__(
        self, contract: dict[str, Any], token_ids: NDArray[np.int32], rows_RD: torch.Tensor, tokenizer: Path
    ) -> None:
        self.contract, self.token_ids, self.rows_RD = contract, token_ids, rows_RD
        self.pad_row = int(np.searchsorted(token_ids, contract["pad_id"]))
        self.tokenizer_file = tokenizer
        self._tokenizer: Any = None

    def text(self, rows: NDArray[np.int64]) -> str:
        """The text of some rows of the table, by the LLM's own tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = read_tokenizer(self.tokenizer_file)
        return str(self._tokenizer.decode(self.token_ids[rows].tolist(), skip_special_tokens=True))

    @property
    def rms(self) -> float:
        """Root mean square of one entry of a real target."""
        return math.sqrt(self.contract["mean_square"])


class TargetSet(TargetTable):
    """A complete target set, opened: its contract, its table of embeddings, and token ids by utterance."""

    def __init__(self, shard_set: Path, name: str) -> None:
        self.root = shard_set / "targets" / name
        if not shards.is_complete(self.root):
            have = sorted(p.parent.name for p in (shard_set / "targets").glob(f"*/{shards.DATASET}"))
            raise UserError(
                f"shard set {shard_set} has no complete target set {name!r}; it has: {', '.join(have) or 'none'}"
            )
        contract = files.read_object(self.root / shards.DATASET)
        if "covers" not in contract:
            raise UserError(
                f"{self.root / shards.DATASET} has no covers: an older version wrote it; remove {self.root} and build "
                "the targets anew"
            )
        utterances = shards.read_table(shard_set, UTTERANCES)
        require_covered(contract["covers"], utterances, self.root)
        if behind := len(utterances) - contract["covers"]["num_utterances"]:
            say(
                f"{self.root} does not cover the last {behind} of {len(utterances)} utterances, which are left out; "
                "to have them run precompute or cluster.retarget again with this LLM"
            )
        arrival.wait_for(self.root / EMBEDDING)
        try:
            tensors = load_file(self.root / EMBEDDING)
        except (SafetensorError, OSError, ValueError, KeyError):  # its header is damaged
            tensors = {}
        if tensors_hash(tensors) != contract.get("embedding_hash"):
            raise UserError(
                f"{self.root / EMBEDDING} is not what was committed; remove {self.root} and build the targets anew"
            )
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        num_rows, width = (*shapes.get("rows", ()), 0, 0)[:2]
        if shapes != {"ids": (num_rows,), "rows": (num_rows, contract.get("width", width))}:
            raise UserError(
                f"{self.root / EMBEDDING} holds {shapes}, not ids and rows of width {contract.get('width', 'D')}; "
                f"remove {self.root} and build the targets anew"
            )
        super().__init__(contract, tensors["ids"].numpy(), tensors["rows"], self.root / TOKENIZER)
        self.table = shards.read_table(self.root, TABLE)
        self.samples = Samples(self.root, self.table, contract.get("columns", TOKENS))

    def rows_of(self, row: int) -> NDArray[np.int64]:
        """Rows of the table [L] for one row of :attr:`table`."""
        rows_L: NDArray[np.int64] = np.searchsorted(self.token_ids, self.samples[row]["tokens"])
        return rows_L


def read_tokenizer(path: Path) -> Any:
    """The tokenizer of a target set.

    Raises:
        UserError: the file is not what a tokenizer wrote.
    """
    arrival.wait_for(path)
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library knows no other
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read as a tokenizer ({reason}); build the targets anew") from None


def join(sets: Sequence[TargetSet]) -> TargetTable:
    """One table for several target sets of one LLM: every token that any of them uses.

    Its contract is the first one's, but for the table's hash and the mean square, which is that over all their tokens.

    Raises:
        UserError: they come from different LLMs, tokenizers, pads or normalisers, or embed a token differently.
    """
    first = sets[0]
    for other in sets[1:]:
        wanted, found = ({name: one.contract[name] for name in SAME_LLM} for one in (first, other))
        remedy = f"sets are mixed by targets of one LLM, as those of {first.root}: build them so with cluster.retarget"
        shards.require_same(wanted, found, str(other.root), remedy)
    token_ids = np.unique(np.concatenate([one.token_ids for one in sets]))
    rows_RD = first.rows_RD.new_zeros((len(token_ids), first.rows_RD.shape[1]))
    is_there = torch.zeros(len(token_ids), dtype=torch.bool)
    for one in sets:
        rows_R = torch.from_numpy(np.searchsorted(token_ids, one.token_ids))
        twice = is_there[rows_R]
        same = one.rows_RD.dtype == rows_RD.dtype and one.rows_RD.shape[1] == rows_RD.shape[1]
        if not same or not torch.equal(rows_RD[rows_R[twice]], one.rows_RD[twice]):
            raise UserError(
                f"{one.root / EMBEDDING}: a token has other values there than in {first.root} or beside it, though "
                f"all are said to come from {first.contract['llm']}; build one of them anew with cluster.retarget"
            )
        rows_RD[rows_R], is_there[rows_R] = one.rows_RD, True
    tokens = [int(one.table.column("num_tokens").to_numpy().sum()) for one in sets]
    mean_square = float(np.average([one.contract["mean_square"] for one in sets], weights=tokens))
    hashed = tensors_hash({"ids": torch.from_numpy(token_ids), "rows": rows_RD})
    parts = [one.contract["part_hashes"] for one in sets]
    contract = {**first.contract, "embedding_hash": hashed, "mean_square": mean_square, "part_hashes": parts}
    return TargetTable(contract, token_ids, rows_RD, first.tokenizer_file)
