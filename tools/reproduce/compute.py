"""What a run has spent: tokens through the LLM, FLOPs, wall minutes.

P_L: parameters of the LLM's layers; V, D: its vocabulary and width; A: width of its attention; n: its layers; M: the
mapper's multiplications a position; L: tokens of a row. A multiplication and its addition are 2 FLOPs.

    mapper  6 M positions + 12 x layers x (2 x 2P x d1 + P x d2) positions: forward 2, backward 4 for each parameter and
            position (Kaplan et al., arXiv 2001.08361); attention's scores and values, 4 x length x width forward
            (Chowdhery et al., arXiv 2204.02311, appendix B), twice that backward. The first stack has 2P frames of P.
    LLM     4 P_L tokens + 4 V D answer tokens: forward 2, and 2 backward, as gradients pass through frozen weights,
            which get none; attention has no weights: 12 n A L tokens. Of an adapter 6 for each parameter and token.

Padding is not counted, nor is validation; positions and answer tokens are items times their means over the split.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sm_train import config, files
from sm_train.data import shards
from sm_train.data.instructions import mean_answer_tokens
from sm_train.data.lengths import num_positions
from sm_train.errors import UserError
from sm_train.models.mapper import MapperConfig
from tools import goodput
from tools.plan_capacity.hardware import Llama, Mapper, read_shape

_AT_WORK = ("steps", "restart", "checkpoint", "replay")


@dataclass(frozen=True, slots=True)
class Compute:
    """What was spent."""

    llm_tokens: float = 0.0
    flop: float = 0.0
    minutes: float = 0.0
    """Of one core, over all starts; the time between starts does not count."""

    def __add__(self, other: Compute) -> Compute:
        return Compute(self.llm_tokens + other.llm_tokens, self.flop + other.flop, self.minutes + other.minutes)


def mean_of(spent: Sequence[Compute]) -> Compute:
    """The mean over seeds."""
    total = sum(spent, Compute())
    return Compute(total.llm_tokens / len(spent), total.flop / len(spent), total.minutes / len(spent))


def mapper_flop(mapper: Mapper, positions: float, length: float) -> float:
    """FLOPs of training a mapper on so many positions, in utterances of ``length`` of them."""
    first, second, _ = mapper.cfg.widths
    attention = 12 * mapper.cfg.layers * length * (2 * 2 * first + second)
    return positions * (6 * mapper.multiplications + attention)


def llm_flop(llm: Llama, tokens: float, row_tokens: float, answer_tokens: float, adapter: int = 0) -> float:
    """FLOPs of a forward and a backward through a frozen LLM.

    Args:
        row_tokens: L, of one item.
        answer_tokens: places at which the head is asked.
        adapter: parameters of an adapter that is trained.
    """
    a_token = 4 * llm.layer_parameters + 12 * llm.layers * llm.attention_width * row_tokens + 6 * adapter
    return tokens * a_token + 4 * llm.vocabulary * llm.width * answer_tokens


def of_run(run: Path) -> Compute:
    """What a run of pretrain or tune has spent, to the step that it has reached.

    Raises:
        UserError: it has no metrics, or those of a version that did not count items.
    """
    starts, lines = goodput.read(run)
    if not lines or "num_items" not in lines[0]:
        raise UserError(f"run folder {run} has no num_items in its metrics: train it again with this version")
    minutes = sum(goodput.account(starts, lines).seconds[kind] for kind in _AT_WORK) / 60
    cfg = config.read_yaml(run / "config.yaml")
    shard_set, checkpoint = Path(cfg["shards"]), run / "checkpoints" / "latest"
    saved = files.read_object(checkpoint / "config.json")
    mapper = Mapper(config.from_mapping(MapperConfig, saved["mapper"], str(checkpoint)), int(saved["output_width"]))
    items = float(sum(line["num_items"] for line in lines))
    length = _mean_positions(shard_set, cfg["splits"])
    flop = mapper_flop(mapper, items * length, length)
    if "tasks" not in cfg:
        return Compute(0.0, flop, minutes)
    tokens = float(sum(line["llm_tokens"] * line["num_items"] for line in lines))
    target = shard_set / "targets" / cfg["target"]
    llm, _ = read_shape(str(cfg["llm"] or files.read_object(target / "dataset.json")["llm"]))
    shares = {name: float(share) for name, share in cfg["tasks"].items() if share > 0}
    answers = items * mean_answer_tokens(target, shares)
    return Compute(tokens, flop + llm_flop(llm, tokens, tokens / items, answers, _adapter(checkpoint)), minutes)


def of_evaluation(folder: Path) -> dict[str, Compute]:
    """Tokens that the LLM read and wrote, and minutes, by system; empty where the evaluation did not count them.

    FLOPs are left at 0.
    """
    tokens, seconds = (_read_if_there(folder / name) for name in ("evaluation.json", "timing.json"))
    return {
        system: Compute(counts["prompt_tokens"] + counts["answer_tokens"], 0.0, sum(seconds[system].values()) / 60)
        for system, counts in tokens.get("llm_tokens", {}).items()
        if system in seconds
    }


def _read_if_there(path: Path) -> dict[str, Any]:
    return files.read_object(path) if path.is_file() else {}


def _mean_positions(shard_set: Path, splits: Sequence[str]) -> float:
    table = shards.read_table(shard_set, "utterances.parquet")
    is_in = np.isin(table.column("split").to_pylist(), list(splits))
    return float(num_positions(np.asarray(table.column("num_frames"))[is_in].astype(np.int64)).mean())


def _adapter(checkpoint: Path) -> int:
    """Parameters of the adapter in a checkpoint; 0 where it has none. Read from the header of its safetensors file."""
    path = checkpoint / "adapter_model.safetensors"
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(int(np.prod(entry["shape"])) for name, entry in header.items() if name != "__metadata__")
