"""Where stage 2's mapper comes from, stage 1, the run's own checkpoint or nothing; and what is trained beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sm_train import config
from sm_train.data.batches import SpeechItems
from sm_train.data.mds import file_digest
from sm_train.errors import UserError
from sm_train.models import adapter
from sm_train.models.adapter import AdapterConfig
from sm_train.models.mapper import MapperConfig, SpeechMapper
from sm_train.runlog import say
from sm_train.scoring import mappers
from sm_train.train import checkpoint

SCRATCH = mappers.SCRATCH


def pretrained(
    path: str, run: Path, speech: SpeechItems, resumed: checkpoint.Checkpoint | None
) -> tuple[SpeechMapper, dict[str, Any]]:
    """The mapper of a run or checkpoint folder, or the run's own once it has a checkpoint.

    Returns:
        The mapper in training mode, and what the run must go on with: ``mapper_hash``.

    Raises:
        UserError: it does not belong to these features and targets.
    """
    own = checkpoint.latest(run) if resumed else None
    found = own or checkpoint.find(Path(path))
    theirs, targets = mappers.read(found.parent, found), speech.targets
    theirs.require_frozen({**speech.dataset, **targets.contract})
    if not resumed and adapter.folder_of(found):
        raise UserError(
            f"{found} was trained with an adapter of the LLM, which would be lost; tune from one without it"
        )
    if not resumed and theirs.is_tuned:
        say(f"warning: {found} is a tuned mapper ({theirs.name}); tuning goes on from it")
    if not resumed and all(theirs.contract.get(n) != targets.contract[n] for n in ("llm", "embedding_hash")):
        own_llm, other_llm = targets.contract["llm"], theirs.contract.get("llm")
        say(f"warning: {found} was pretrained for LLM {other_llm}; the targets are those of {own_llm}")
    mapper, width = SpeechMapper.from_pretrained(found), targets.rows_RD.shape[1]
    if mapper.output_width != width:
        raise UserError(f"{found}: its mapper gives vectors of {mapper.output_width} numbers, this LLM takes {width}")
    origin = resumed.contract["mapper_hash"] if resumed else file_digest(found / checkpoint.WEIGHTS)
    if resumed and Path(path).exists():  # it may be gone by now, but not another one
        origin = file_digest(checkpoint.find(Path(path)) / checkpoint.WEIGHTS)
    return mapper.train(), {"mapper_hash": origin}


def scratch(
    shape: MapperConfig, seed: int, speech: SpeechItems, resumed: checkpoint.Checkpoint | None, run: Path
) -> tuple[SpeechMapper, dict[str, Any]]:
    """A mapper with random weights that follow from the seed, its output as large as the LLM's embeddings.

    Returns:
        The mapper in training mode, and what the run must go on with: ``mapper_hash`` and its shape.

    Raises:
        UserError: the shape does not fit the features.
    """
    if shape.widths[0] != (width := speech.feature_width):
        raise UserError(f"shape.widths[0] is {shape.widths[0]}, but the encoder's features are {width} wide")
    torch.manual_seed(seed)
    targets = speech.targets
    mapper = SpeechMapper(shape, speech.feature_width, targets.rows_RD.shape[1], targets.rms)
    if resumed and (own := checkpoint.latest(run)):
        mapper = SpeechMapper.from_pretrained(own)
    values = {f"shape.{name}": value for name, value in config.to_mapping(shape).items()}
    return mapper.train(), {"mapper_hash": SCRATCH, **values}


def trained(
    mapper: SpeechMapper, llm: Any, lora: AdapterConfig, seed: int, llm_path: str
) -> tuple[nn.Module, dict[str, Any]]:
    """What is trained: the mapper, or the mapper and a new adapter of the LLM, which is put into it.

    Returns:
        Its module, and what a checkpoint's ``config.json`` holds.
    """
    described: dict[str, Any] = mapper.description()
    if not lora.rank:
        return mapper, described
    described["adapter"] = lora.description(llm_path)
    torch.manual_seed(seed)
    adapter.add(llm, described["adapter"])
    return adapter.WithAdapter(mapper, llm), described
