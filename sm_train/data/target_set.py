"""A target set, read: token ids by utterance, and the rows of one LLM's input embedding that they use.

Shape letters: R rows of the table, L tokens, D LLM width.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

from sm_train import files
from sm_train.data import shards
from sm_train.data.hashing import tensors_hash
from sm_train.data.samples import TOKENS, Samples
from sm_train.errors import UserError

TABLE = "tokens.parquet"
EMBEDDING = "embedding.safetensors"
TOKENIZER = "tokenizer.json"


class TargetSet:
    """A complete target set, opened: its contract, its table of embeddings, and token ids by utterance."""

    def __init__(self, shard_set: Path, name: str) -> None:
        self.root = shard_set / "targets" / name
        if not shards.is_complete(self.root):
            have = sorted(p.parent.name for p in (shard_set / "targets").glob(f"*/{shards.DATASET}"))
            raise UserError(
                f"shard set {shard_set} has no complete target set {name!r}; it has: {', '.join(have) or 'none'}"
            )
        self.contract: dict[str, Any] = files.read_json(self.root / shards.DATASET)
        covered = {"utterances": files.read_json(shard_set / shards.DATASET)["part_hashes"]}
        found = {"utterances": self.contract["utterances"]}
        shards.require_same(covered, found, str(self.root), "the shard set has changed: build the targets anew")
        try:
            tensors = load_file(self.root / EMBEDDING)
        except (SafetensorError, OSError, ValueError, KeyError):  # its header is damaged
            tensors = {}
        if tensors_hash(tensors) != self.contract["embedding_hash"]:
            raise UserError(
                f"{self.root / EMBEDDING} is not what was committed; remove {self.root} and build the targets anew"
            )
        self.token_ids: NDArray[np.int32] = tensors["ids"].numpy()
        self.rows_RD: torch.Tensor = tensors["rows"]
        self.pad_row = int(np.searchsorted(self.token_ids, self.contract["pad_id"]))
        self.table = shards.read_table(self.root, TABLE)
        self.samples = Samples(self.root, self.table, TOKENS)
        self._tokenizer: Any = None

    def rows_of(self, row: int) -> NDArray[np.int64]:
        """Rows of the table [L] for one row of :attr:`table`."""
        rows_L: NDArray[np.int64] = np.searchsorted(self.token_ids, self.samples[row]["tokens"])
        return rows_L

    def text(self, rows: NDArray[np.int64]) -> str:
        """The text of some rows of the table, by the LLM's own tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(self.root / TOKENIZER))
        return str(self._tokenizer.decode(self.token_ids[rows].tolist(), skip_special_tokens=True))

    @property
    def rms(self) -> float:
        """Root mean square of one entry of a real target."""
        return math.sqrt(self.contract["mean_square"])
