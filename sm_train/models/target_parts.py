"""Parts of a target set: transcripts become token ids and, by choice, the rows of the LLM's embedding.

Shape letters: L tokens, D LLM width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sm_train.data import shards
from sm_train.data.hashing import tensors_hash
from sm_train.data.lengths import num_positions
from sm_train.data.samples import TOKENS
from sm_train.data.text import normalise
from sm_train.errors import UserError
from sm_train.models.embedding import embedding_module
from sm_train.models.tokenizer import Tokenizer, tokenizer_hash
from sm_train.records import Quarantined

STORES = ("ids", "vectors")
# MDS has no bfloat16.
_STORED_AS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "uint16"}


class PartWriter:
    """Writes parts: the token ids of some utterances and, if ``store`` is vectors, their rows of the embedding too.

    Args:
        root: the target set's folder.
        folder: the LLM's.

    Raises:
        UserError: what the LLM's folder lacks, or a pad that its embedding does not have.
    """

    def __init__(self, root: Path, folder: Path, pad_token: str | None, normaliser: str, store: str) -> None:
        self.root, self.folder, self.normaliser, self.store = root, folder, normaliser, store
        self.tokenizer, self.module = Tokenizer(folder, pad_token), embedding_module(folder)
        weight_VD = self.module.get_parameter("weight")
        self.num_rows, width = weight_VD.shape
        self.facts = {"llm_embedding_hash": tensors_hash({"weight": weight_VD}), "width": width}
        self.columns = dict(TOKENS)
        self.contract: dict[str, Any] = {"tokenizer_hash": tokenizer_hash(self.tokenizer.inner)}
        self.contract |= {"pad_token": self.tokenizer.pad_token, "pad_id": self.tokenizer.pad_id}
        self.contract |= {"dtype": str(weight_VD.dtype).removeprefix("torch."), "columns": self.columns}
        self.require_row(self.tokenizer.pad_id)
        if store == "vectors":
            self._add_vectors(weight_VD.dtype)

    def _add_vectors(self, dtype: torch.dtype) -> None:
        if dtype not in _STORED_AS:
            raise UserError(f"LLM {self.folder}: vectors of {dtype} cannot be stored; set store to ids")
        self.columns["vectors"] = f"ndarray:{_STORED_AS[dtype]}"
        bits = ", which holds the bits of each number" if dtype == torch.bfloat16 else ""
        self.contract["vectors"] = f"[tokens, width] {self.contract['dtype']} as {_STORED_AS[dtype]}{bits}"

    def require_row(self, token_id: int) -> None:
        """Raises UserError if the embedding has no row for a token."""
        if token_id >= self.num_rows:
            raise UserError(
                f"LLM {self.folder}: its tokenizer gives the id {token_id} (the pad {self.tokenizer.pad_token!r} is "
                f"{self.tokenizer.pad_id}), but its embedding has {self.num_rows} rows; name another pad_token"
            )

    def write(self, part: str, first: int, utterances: Any) -> None:
        """Write the part of some utterances, the first of which is the set's utterance ``first``."""
        positions = num_positions(utterances.column("num_frames").to_numpy()).tolist()
        ids, texts = utterances.column("id").to_pylist(), utterances.column("text").to_pylist()
        tokens, rows, quarantined = [], [], []
        for i, (id, text) in enumerate(zip(ids, texts, strict=True)):
            token_ids = self.tokenizer.ids(normalise(text, self.normaliser))
            problem = _problem(len(token_ids), positions[i], text)
            if problem:
                quarantined.append(Quarantined(id, *problem))
                continue
            self.require_row(max(token_ids))
            tokens.append(np.array(token_ids, np.int32))
            rows.append({"id": id, "utterance": first + i, "num_tokens": len(token_ids)})
        samples = ({"id": row["id"], **self._stored(tokens_L)} for row, tokens_L in zip(rows, tokens, strict=True))
        shards.write_part(self.root, part, self.columns, samples, rows, quarantined, self.facts)

    def _stored(self, tokens_L: NDArray[np.int32]) -> dict[str, Any]:
        if self.store == "ids":
            return {"tokens": tokens_L}
        vectors_LD = self.embed(tokens_L)
        is_bf16 = vectors_LD.dtype == torch.bfloat16
        return {"tokens": tokens_L, "vectors": (vectors_LD.view(torch.uint16) if is_bf16 else vectors_LD).numpy()}

    @torch.inference_mode()
    def embed(self, ids: NDArray[np.int32]) -> torch.Tensor:
        """What the LLM would compute for some ids, each a row."""
        vectors: torch.Tensor = self.module(torch.from_numpy(ids).long())
        return vectors.contiguous()


def _problem(num_tokens: int, positions: int, text: str) -> tuple[str, str] | None:
    if num_tokens == 0:
        return "empty_text", f"nothing is left of {text!r} after normalising"
    if num_tokens > positions:
        return "too_many_tokens", f"{num_tokens} tokens do not fit {positions} positions"
    return None
