"""Targets: what a transcript becomes in an LLM's input space, without building the LLM.

A target set is one LLM's: the token ids of every utterance, and the rows of the LLM's input embedding that they use. It
covers the utterances that its shard set had when it was built, and is extended when the shard set has grown.
Shape letters: V vocabulary, R rows of the table, L tokens, D LLM width.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from sm_train import config, files
from sm_train.data import shards, store
from sm_train.data.hashing import tensors_hash
from sm_train.data.target_set import (
    EMBEDDING,
    TABLE,
    TOKENIZER,
    UTTERANCES,
    cover,
    require_covered,
    stored_tokens,
)
from sm_train.data.text import NORMALISERS
from sm_train.models import checkpoints
from sm_train.models.target_parts import STORES, PartWriter
from sm_train.models.tokenizer import Tokenizer

_MANY = 0.05  # of the utterances, without targets: a warning
PART_UTTERANCES = 16_384
_GROWS = ("covers", "extended_at")


@dataclass(frozen=True)
class TargetConfig:
    """One LLM whose input embeddings are targets."""

    name: str = config.key(config.REQUIRED, "the target set's name: targets/NAME in the shard set")
    llm: str = config.key(config.REQUIRED, "folder or hub repository of the LLM; only its embedding tensor is read")
    revision: str | None = config.key(None, "hub revision to pin; null for a folder")
    pad_token: str | None = config.key(
        None, "the token that fills the positions after the text; null takes the tokenizer's own"
    )
    normaliser: str = config.key("mms", "how transcripts are normalised before they are tokenised: mms | none")
    store: str = config.key("ids", "ids | vectors: with vectors each sample also holds its tokens' embedding rows")

    def __post_init__(self) -> None:
        if self.normaliser not in NORMALISERS:
            raise ValueError(f"targets: normaliser is {self.normaliser!r}; it must be one of {', '.join(NORMALISERS)}")
        if self.store not in STORES:
            raise ValueError(f"targets: store is {self.store!r}; it must be one of {', '.join(STORES)}")
        if self.name != Path(self.name).name or self.name.startswith("."):
            raise ValueError(f"targets: name is {self.name!r}; it must be the name of a folder, without a path")


def require_llm(cfg: TargetConfig) -> None:
    """Raises UserError if the LLM, its tokenizer or its pad are not to be had: cheap, before anything is encoded."""
    Tokenizer(checkpoints.resolve(cfg.llm, cfg.revision, "LLM"), cfg.pad_token)


def make(cfg: TargetConfig, shard_set: Path) -> str:
    """:func:`build`, told in one line for the terminal: what was done, and what is in the set's own quarantine."""
    root = shard_set / "targets" / cfg.name
    was_complete = shards.is_complete(root)
    wrote = build(cfg, shard_set)
    state = "complete" if not wrote else "extended" if was_complete else "built"
    reasons = Counter(shards.read_table(root, shards.QUARANTINE).column("reason").to_pylist()).most_common()
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons)
    num_committed = files.read_json(root / shards.DATASET)["num_committed"]
    if reasons and reasons[0][1] > _MANY * num_committed:
        remedy = (
            "; a position has room for one token: a smaller encoder.pool makes more"
            if "tokens" in reasons[0][0]
            else ""
        )
        print(f"warning: {root}: {counts} against {num_committed} utterances with targets{remedy}", flush=True)
    left_out = f", {sum(count for _, count in reasons)} quarantined ({counts})" if reasons else ""
    return f"{state}, {num_committed} utterances{left_out}"


def build(cfg: TargetConfig, shard_set: Path) -> bool:
    """Write ``targets/NAME`` of a complete shard set, or extend it to utterances that were added behind the others.

    A complete one with the same contract that covers all utterances is left alone. Killed at any point, a set is as it
    was, or it is not complete and the same command completes it. Parts that are there keep their names and bytes.

    Returns:
        Whether anything was written.

    Raises:
        UserError: what the LLM's folder lacks; a set of that name with another contract, or of other utterances.
    """
    root = shard_set / "targets" / cfg.name
    utterances = shards.read_table(shard_set, UTTERANCES)
    if shards.is_complete(root) and _is_up_to_date(cfg, root, utterances):
        return False
    folder = checkpoints.resolve(cfg.llm, cfg.revision, "LLM")
    writer = PartWriter(root, folder, cfg.pad_token, cfg.normaliser, cfg.store)
    contract = _open(
        root, {**_asked_for(cfg), **writer.contract}, writer.facts, cover(shard_set, utterances), utterances
    )
    writer.tokenizer.warn_of_pad()
    shards.remove_leftovers(root)
    parts = []
    for number, cut in enumerate(_cuts([0, *contract["extended_at"], len(utterances)])):
        parts.append(f"part-{number:07d}")
        if not shards.is_committed(root, parts[-1]):
            writer.write(parts[-1], cut.start, utterances.slice(cut.start, len(cut)))
    measured = _write_embedding(writer, parts)
    files.write_text(root / TOKENIZER, writer.tokenizer.inner.backend_tokenizer.to_str())
    shards.commit(root, parts, {**contract, **measured}, TABLE)
    return True


def _asked_for(cfg: TargetConfig) -> dict[str, Any]:
    asked = {"schema": 2, "llm": cfg.llm, "llm_revision": cfg.revision, "normaliser": cfg.normaliser}
    return {**asked, "store": cfg.store, **({"pad_token": cfg.pad_token} if cfg.pad_token else {})}


def _remedy(root: Path) -> str:
    return f"remove {root} to build it anew, or give another name"


def _is_up_to_date(cfg: TargetConfig, root: Path, utterances: Any) -> bool:
    found, asked = files.read_json(root / shards.DATASET), _asked_for(cfg)
    shards.require_same(asked, {name: found.get(name) for name in asked}, str(root), _remedy(root))
    require_covered(found["covers"], utterances, root)
    return bool(found["covers"]["num_utterances"] == len(utterances))


def _open(
    root: Path, asked: Mapping[str, Any], facts: Mapping[str, Any], covers: Mapping[str, Any], utterances: Any
) -> dict[str, Any]:
    """Start, go on with or extend a set; returns its contract with what it will cover and where it was extended."""
    path, parts, extended_at = root / shards.CONTRACT, sorted(root.glob(f"part-*/{shards.DONE}")), list[int]()
    started = files.read_json(path) if path.exists() and parts else None
    if started:
        same = {name: value for name, value in started.items() if name not in _GROWS}
        shards.require_same(asked, same, str(root), _remedy(root))
        require_covered(started["covers"], utterances, root)
        shards.require_same(facts, shards.read_part(root, parts[0].parent.name)["facts"], str(root), _remedy(root))
        before = started["covers"]["num_utterances"]
        extended_at = [*started["extended_at"], *([before] if before < len(utterances) else [])]
    contract = {**asked, "covers": dict(covers), "extended_at": extended_at}
    if shards.is_complete(root):
        store.at(root).remove(shards.DATASET)
        files.sync(root)
    if started:
        files.write_json(path, contract)
    shards.open_set(root, contract)
    return contract


def _cuts(bounds: Sequence[int]) -> list[range]:
    """The utterances of each part: none crosses a place where the set was extended, so that old parts stay."""
    return [
        range(start, min(start + PART_UTTERANCES, end))
        for begin, end in itertools.pairwise(bounds)
        for start in range(begin, end, PART_UTTERANCES)
    ]


def _write_embedding(writer: PartWriter, parts: Sequence[str]) -> dict[str, Any]:
    """Write the rows that the parts' tokens and the pad use; returns what was learned of them.

    The mean square is that of one entry over the real targets of the corpus: the scale of ``mse: relative``.
    """
    counts_V = np.zeros(writer.num_rows, np.int64)
    for tokens in stored_tokens(writer.root, parts, writer.columns):
        np.add.at(counts_V, tokens, 1)
    pad_id = writer.tokenizer.pad_id
    used = np.union1d(np.flatnonzero(counts_V), [pad_id]).astype(np.int32)
    rows_RD, counts_R = writer.embed(used), counts_V[used]
    _warn_of_small_pad(rows_RD, int(np.searchsorted(used, pad_id)), writer.tokenizer.pad_token)
    tensors = {"ids": torch.from_numpy(used), "rows": rows_RD}
    files.write_whole(writer.root / EMBEDDING, lambda aside: save_file(tensors, aside))
    squares_R = rows_RD.double().square().mean(dim=1).numpy()
    mean_square = float((squares_R * counts_R).sum() / counts_R.sum())
    return {"num_rows": len(used), "mean_square": mean_square, "embedding_hash": tensors_hash(tensors)}


def _warn_of_small_pad(rows_RD: torch.Tensor, pad_row: int, pad_token: str) -> None:
    norms = rows_RD.float().norm(dim=1)
    if norms[pad_row] < 1e-3 * norms.median():
        print(
            f"warning: the embedding of pad_token {pad_token!r} has the norm {norms[pad_row]:.1e}, a typical one "
            f"{norms.median():.1e}; decode with trim: change_point, since a doubtful word is nearest to such a pad"
        )
