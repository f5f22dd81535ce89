"""What a training config names, in shapes: the LLM from its config.json alone, the mapper, the table of targets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.fit.hub import folder_of
from cluster.fit.memory import Llama, Mapper
from sm_train import config, files
from sm_train.errors import UserError
from sm_train.models.mapper import MapperConfig
from sm_train.pretrain import PretrainConfig
from sm_train.train import checkpoint
from sm_train.train.origin import SCRATCH
from sm_train.tune import TuneConfig

TrainingConfig = PretrainConfig | TuneConfig

_NO_MAPPER = MapperConfig(widths=[2, 2, 2], layers=1, heads=1, feed_forward=1)
_KEYS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_TIED = ("gemma", "gemma2", "gemma3", "gemma3_text")
"""Families whose head is the input embedding unless their config says otherwise."""


def read_shape(path: str, revision: str | None = None) -> tuple[Llama, str]:
    """The shape of the LLM in a folder or in the hub's cache, and the dtype of its files.

    Raises:
        UserError: it cannot be known, and why.
    """
    folder = folder_of(path, revision)
    if folder is None:
        raise UserError(f"the shape of LLM {path} is not known: it is neither a folder here nor in the hub's cache")
    settings = files.read_object(folder / "config.json")
    return shape_of(settings, path), str(settings.get("dtype") or settings.get("torch_dtype") or "unknown")


def shape_of(settings: Mapping[str, Any], name: str) -> Llama:
    """The shape that a config.json describes, as if its layers were Llama's.

    Raises:
        UserError: it describes another kind of model.
    """
    text = settings.get("text_config") or settings
    lacking = [key for key in _KEYS if not isinstance(text.get(key), int)]
    if lacking or any((text.get(key) or 0) > 1 for key in _EXPERTS):
        why = f"its config.json has no {lacking[0]}" if lacking else "it is a mixture of experts"
        raise UserError(f"the memory of LLM {name} is not known: {why}")
    layers, width, heads, feed_forward, vocabulary = (int(text[key]) for key in _KEYS)
    is_tied = text.get("tie_word_embeddings", settings.get("tie_word_embeddings"))
    if is_tied is None:
        is_tied = text.get("model_type") in _TIED
    kv_heads, head_width = text.get("num_key_value_heads") or heads, text.get("head_dim") or 0
    return Llama(layers, width, heads, int(kv_heads), feed_forward, vocabulary, int(head_width), bool(is_tied))


def table_shape(shard_set: str, target: str) -> tuple[int, int] | None:
    """Rows and width of a local target set's table of embeddings; None where it is not here."""
    path = Path(shard_set) / "targets" / target / "embedding.safetensors"
    if "://" in shard_set or not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            header = files.parse_object(file.read(int.from_bytes(file.read(8), "little")), str(path))
        rows, width = header["rows"]["shape"]
    except (OSError, KeyError, TypeError, ValueError, UserError):
        return None
    return int(rows), int(width)


def mapper_of(cfg: TrainingConfig, width: int | None = None) -> tuple[Mapper, str]:
    """The mapper that a stage trains, and why it is not known; nearly nothing is counted for it then.

    Args:
        width: of the LLM; None takes the target set's, or the head's own where there is no target set.
    """
    if width is None:
        table = largest_table(cfg)
        width = table[1] if table else None
    if isinstance(cfg, PretrainConfig):
        return Mapper(cfg.mapper, width or cfg.mapper.widths[2]), ""
    if cfg.mapper == SCRATCH:
        return Mapper(cfg.shape, width or cfg.shape.widths[2]), ""
    try:
        saved = files.read_object(checkpoint.find(Path(cfg.mapper)) / "config.json")
        shape = config.from_mapping(MapperConfig, saved["mapper"], cfg.mapper)
        return Mapper(shape, width or int(saved["output_width"])), ""
    except (UserError, KeyError):
        return Mapper(_NO_MAPPER, width or 2), f"no mapper, as {cfg.mapper} has none yet"


def llm_of(cfg: TuneConfig) -> tuple[str, str | None]:
    """The LLM that a config names, or its target set does: path and revision.

    Raises:
        UserError: neither does.
    """
    if cfg.llm:
        return cfg.llm, cfg.llm_revision
    path = Path(cfg.shards) / "targets" / cfg.target / "dataset.json"
    if "://" in cfg.shards or not path.is_file():
        raise UserError(f"the LLM is not known: llm is not set, and target set {path.parent} is not here")
    contract = files.read_object(path)
    return str(contract.get("llm")), contract.get("llm_revision")


def largest_table(cfg: TrainingConfig) -> tuple[int, int] | None:
    """Rows and width of the largest table of targets that is here."""
    return max(filter(None, (table_shape(shards, cfg.target) for shards in sets_of(cfg))), default=None)


def sets_of(cfg: TrainingConfig) -> list[str]:
    """The shard sets that a config names."""
    return [cfg.shards] if isinstance(cfg.shards, str) else list(cfg.shards)
