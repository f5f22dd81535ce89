"""Targets: what a transcript becomes in an LLM's input space, without building the LLM.

A target set is one LLM's: the token ids of every utterance, and the rows of the LLM's input embedding that they use.
Shape letters: R rows of the table, L tokens, D LLM width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from sm_train import config, files
from sm_train.data import shards
from sm_train.data.hashing import tensors_hash
from sm_train.data.lengths import num_positions
from sm_train.data.samples import TOKENS, Samples
from sm_train.data.target_set import EMBEDDING, TABLE, TOKENIZER, TargetSet
from sm_train.data.text import NORMALISERS, normalise
from sm_train.errors import UserError
from sm_train.models import checkpoints
from sm_train.models.tokenizer import Tokenizer, tokenizer_hash
from sm_train.records import Quarantined

PART_UTTERANCES = 16_384


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

    def __post_init__(self) -> None:
        if self.normaliser not in NORMALISERS:
            raise ValueError(f"targets: normaliser is {self.normaliser!r}; it must be one of {', '.join(NORMALISERS)}")


def embedding_module(folder: Path) -> torch.nn.Module:
    """The LLM's own input-embedding module, in its checkpoint's dtype: ``module(ids)`` is what the LLM would compute.

    The family's model is built with no layers on the CPU (not on meta: Gemma 3 scales by a buffer that no checkpoint
    holds), and one tensor is read by its key.

    Raises:
        UserError: the folder has no input-embedding tensor, or one of another shape than its config says.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        text_settings = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    except Exception as error:  # whatever its library makes of a damaged file
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"LLM {folder}: its config.json cannot be used ({reason})") from None
    name, tensor = _embedding_tensor(folder, tied=text_settings.tie_word_embeddings)
    width = getattr(text_settings, "hidden_size", None)
    if tensor.ndim != 2 or tensor.shape[1] != width:
        raise UserError(
            f"LLM {folder}: tensor {name!r} has the shape {tuple(tensor.shape)}; its config says width {width}"
        )
    text_settings.num_hidden_layers = 0
    if getattr(text_settings, "layer_types", None):
        text_settings.layer_types = []
    # The vocabulary is set to one row while building, so that no full-size random table is ever made.
    text_settings.vocab_size, text_settings.pad_token_id = 1, None
    model = AutoModelForCausalLM.from_config(text_settings, dtype=tensor.dtype)
    module: torch.nn.Module = model.get_input_embeddings()
    module.weight = torch.nn.Parameter(tensor, requires_grad=False)
    module.num_embeddings = len(tensor)  # type: ignore[assignment]
    return module.eval()


def _embedding_tensor(folder: Path, tied: bool) -> tuple[str, torch.Tensor]:
    names = sorted(checkpoints.weight_map(folder))
    endings = ["embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight"]
    for ending in endings + (["lm_head.weight"] if tied else []):
        matches = [name for name in names if name == ending or name.endswith("." + ending)]
        language = [name for name in matches if "vision" not in name and "audio" not in name]
        if len(language) == 1:
            return language[0], checkpoints.read_tensors(folder, {language[0]}, "LLM")[language[0]]
    raise UserError(
        f"LLM {folder} has no one input-embedding tensor (looked for {', '.join(endings)} among {len(names)} tensors)"
    )


def require_embeddings(folder: Path, targets: TargetSet) -> int:
    """How many tokens the LLM in a folder embeds.

    Raises:
        UserError: it does not embed the targets' tokens exactly as the targets have them.
    """
    module, ids = embedding_module(folder), torch.from_numpy(targets.token_ids).long()
    fits = int(ids.max()) < module.num_embeddings  # type: ignore[operator]
    with torch.inference_mode():
        own_RD = module(ids) if fits else None
    if own_RD is None or own_RD.shape != targets.rows_RD.shape or not torch.equal(own_RD, targets.rows_RD):
        raise UserError(
            f"LLM {folder} does not embed tokens as target set {targets.root} has them; "
            f"name the LLM that the targets came from ({targets.contract['llm']})"
        )
    return int(module.num_embeddings)  # type: ignore[arg-type]


def build(cfg: TargetConfig, shard_set: Path) -> bool:
    """Write ``targets/NAME`` of a complete shard set; a complete one with the same contract is left alone.

    Returns:
        Whether anything was written.

    Raises:
        UserError: what the LLM's folder lacks, or a set of that name with another contract.
    """
    root = shard_set / "targets" / cfg.name
    asked = _asked_for(cfg, shard_set)
    if shards.is_complete(root):
        found = files.read_json(root / shards.DATASET)
        remedy = f"remove {root} to build it anew, or give another name"
        shards.require_same(asked, {name: found.get(name) for name in asked}, str(root), remedy)
        return False
    utterances = shards.read_table(shard_set, "utterances.parquet")
    folder = checkpoints.resolve(cfg.llm, cfg.revision, "LLM")
    tokenizer = Tokenizer(folder, cfg.pad_token)
    backend = tokenizer.inner.backend_tokenizer.to_str()
    contract = {**asked, "tokenizer_hash": tokenizer_hash(tokenizer.inner)}
    contract |= {"pad_token": tokenizer.pad_token, "pad_id": tokenizer.pad_id}
    module = embedding_module(folder)
    shards.open_set(root, contract)
    tokenizer.warn_of_pad()
    shards.remove_leftovers(root)
    parts = _write_parts(root, utterances, tokenizer, cfg.normaliser)
    used = _used_ids(root, parts, tokenizer.pad_id)
    if used[-1] >= module.num_embeddings:
        raise UserError(
            f"LLM {folder}: its tokenizer gives the id {used[-1]} (the pad {tokenizer.pad_token!r} is "
            f"{tokenizer.pad_id}), but its embedding has {module.num_embeddings} rows; name another pad_token"
        )
    with torch.inference_mode():
        rows_RD = module(torch.from_numpy(used).long()).contiguous()
    _warn_of_small_pad(rows_RD, int(np.searchsorted(used, tokenizer.pad_id)), tokenizer.pad_token)
    tensors = {"ids": torch.from_numpy(used), "rows": rows_RD}
    files.write_whole(root / EMBEDDING, lambda aside: save_file(tensors, aside))
    files.write_text(root / TOKENIZER, backend)
    measured = {"dtype": str(rows_RD.dtype).removeprefix("torch."), "width": rows_RD.shape[1], "num_rows": len(used)}
    measured["mean_square"] = _mean_square(root, parts, used, rows_RD)
    measured["embedding_hash"] = tensors_hash(tensors)
    shards.commit(root, parts, {**contract, **measured}, TABLE)
    return True


def _asked_for(cfg: TargetConfig, shard_set: Path) -> dict[str, Any]:
    utterances = files.read_json(shard_set / shards.DATASET)["part_hashes"]
    asked = {"schema": 1, "llm": cfg.llm, "llm_revision": cfg.revision, "normaliser": cfg.normaliser}
    return {**asked, "utterances": utterances, **({"pad_token": cfg.pad_token} if cfg.pad_token else {})}


def _write_parts(root: Path, utterances: Any, tokenizer: Tokenizer, normaliser: str) -> list[str]:
    ids, texts = utterances.column("id").to_pylist(), utterances.column("text").to_pylist()
    positions = num_positions(utterances.column("num_frames").to_numpy())
    parts = []
    for start in range(0, len(ids), PART_UTTERANCES):
        part = f"part-{start // PART_UTTERANCES:07d}"
        parts.append(part)
        if shards.is_committed(root, part):
            continue
        samples, rows, quarantined = [], [], []
        for ordinal in range(start, min(start + PART_UTTERANCES, len(ids))):
            token_ids = tokenizer.ids(normalise(texts[ordinal], normaliser))
            problem = _problem(len(token_ids), int(positions[ordinal]), texts[ordinal])
            if problem:
                quarantined.append(Quarantined(ids[ordinal], *problem))
                continue
            samples.append({"id": ids[ordinal], "tokens": np.array(token_ids, np.int32)})
            rows.append({"id": ids[ordinal], "utterance": ordinal, "num_tokens": len(token_ids)})
        shards.write_part(root, part, TOKENS, samples, rows, quarantined, facts={})
    return parts


def _problem(num_tokens: int, positions: int, text: str) -> tuple[str, str] | None:
    if num_tokens == 0:
        return "empty_text", f"nothing is left of {text!r} after normalising"
    if num_tokens > positions:
        return "too_many_tokens", f"{num_tokens} tokens do not fit {positions} positions"
    return None


def _stored_tokens(root: Path, parts: Sequence[str]) -> Iterator[NDArray[np.int32]]:
    rows = [{**row, "part": part} for part in parts for row in shards.read_part(root, part)["rows"]]
    if not rows:
        raise UserError(f"target set {root}: not one transcript fits its utterance; see the quarantine of its parts")
    import pyarrow as pa

    with Samples(root, pa.Table.from_pylist(rows), TOKENS) as samples:
        for row in range(len(samples)):
            yield samples[row]["tokens"]


def _used_ids(root: Path, parts: Sequence[str], pad_id: int) -> NDArray[np.int32]:
    used = {pad_id}
    for tokens in _stored_tokens(root, parts):
        used.update(tokens.tolist())
    return np.array(sorted(used), np.int32)


def _mean_square(root: Path, parts: Sequence[str], used: NDArray[np.int32], rows_RD: torch.Tensor) -> float:
    """Mean square of one entry over the real targets of the corpus: the scale of ``mse: relative``."""
    counts = np.zeros(len(used), np.int64)
    for tokens in _stored_tokens(root, parts):
        counts += np.bincount(np.searchsorted(used, tokens), minlength=len(used))
    squares = rows_RD.double().square().mean(dim=1).numpy()
    return float((squares * counts).sum() / counts.sum())


def _warn_of_small_pad(rows_RD: torch.Tensor, pad_row: int, pad_token: str) -> None:
    norms = rows_RD.float().norm(dim=1)
    if norms[pad_row] < 1e-3 * norms.median():
        print(
            f"warning: the embedding of pad_token {pad_token!r} has the norm {norms[pad_row]:.1e}, a typical one "
            f"{norms.median():.1e}; decode with trim: change_point, since a doubtful word is nearest to such a pad"
        )
