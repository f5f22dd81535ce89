"""What an exported folder says of itself, and its table of target rows.

config.json          the frozen models and their hashes, where positions end, the pad: this file's SpeechLlmConfig
mapper/              a checkpoint without its moments: mapper.safetensors, config.json (its shape), state.json
targets.safetensors  the rows of the LLM's input embedding that say where a text ends, and their token ids
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedConfig

from sm_train import files
from sm_train.data.hashing import tensors_hash
from sm_train.data.mds import file_digest
from sm_train.data.target_set import TOKENIZER, TargetTable
from sm_train.errors import UserError
from sm_train.models import checkpoints
from sm_train.models.llm import LlmConfig
from sm_train.models.speech import EncoderConfig

MAPPER, TARGETS = "mapper", "targets.safetensors"
WEIGHTS, STATE = "mapper.safetensors", "state.json"
INSIDE = "./"
"""How the path of a model begins that was copied into the folder."""


class SpeechLlmConfig(PreTrainedConfig):  # type: ignore[misc]
    """``config.json`` of an exported folder. ``dtype`` is the LLM's, unless a person asks for another."""

    model_type = "speech_mapper_llm"
    system: str = ""
    """The mapper's name in results and reports."""
    speech_encoder: dict[str, Any] = field(default_factory=dict)
    """path, revision, layer, pool, dtype, weights_hash, settings_hash"""
    llm: dict[str, Any] = field(default_factory=dict)
    """path, revision, hash (of its folder: :func:`checkpoints.fingerprint`)"""
    targets: dict[str, Any] = field(default_factory=dict)
    """What the table comes from: tokenizer_hash, pad_id, normaliser, mean_square, embedding_hash, ..."""
    trim: str = "change_point"
    """Where a text ends among the positions."""

    def encoder_config(self, root: Path, path: str | None, device: str) -> EncoderConfig:
        """The frozen encoder; ``path`` is where it lies instead."""
        said = self.speech_encoder
        where, revision = _place(root, said, path)
        return EncoderConfig(where, revision, said["layer"], said["pool"], said["dtype"], device)

    def llm_config(
        self, root: Path, path: str | None, dtype: str | None, device: str, device_map: str | None
    ) -> LlmConfig:
        """The frozen LLM; ``path`` is where it lies instead."""
        where, revision = _place(root, self.llm, path)
        own = str(self.dtype or torch.float32).removeprefix("torch.")
        return LlmConfig(where, revision, dtype or own, device, device_map)


def _place(root: Path, said: dict[str, Any], path: str | None) -> tuple[str, str | None]:
    if path is not None:
        return path, None
    inside = said["path"].startswith(INSIDE)
    return str(root / said["path"]) if inside else said["path"], said["revision"]


def open_folder(folder: str | Path, revision: str | None = None) -> Path:
    """The exported folder, or the hub repository of one, in the local cache.

    Raises:
        UserError: it holds no exported model, or its mapper is not the one that was written.
    """
    root = checkpoints.resolve(str(folder), revision, "exported model")
    found = files.read_object(root / "config.json").get("model_type")
    if found != SpeechLlmConfig.model_type:
        raise UserError(
            f"{folder} holds no exported model: its model_type is {found!r}; make one with python -m sm_train.export"
        )
    wanted = files.read_object(root / MAPPER / STATE).get("files", {})
    for name in {WEIGHTS: None, **wanted}:
        path = root / MAPPER / name
        if not path.is_file() or file_digest(path) != wanted.get(name):
            raise UserError(f"{path} is not what was written; export the run again, or copy the folder again")
    return root


def read_targets(root: Path, contract: dict[str, Any]) -> TargetTable:
    """The table of an exported folder.

    Raises:
        UserError: it is not the one that was written.
    """
    try:
        tensors = load_file(root / TARGETS)
    except (SafetensorError, OSError, ValueError, KeyError):
        tensors = {}
    if tensors_hash(tensors) != contract["embedding_hash"]:
        raise UserError(f"{root / TARGETS} is not what was written; export the run again, or copy the folder again")
    return TargetTable(contract, tensors["ids"].numpy(), tensors["rows"], root / TOKENIZER)
