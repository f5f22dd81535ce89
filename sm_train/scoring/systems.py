"""The systems that are compared: what each puts where the speech stands in a prompt.

Shape letters: N vectors, P positions, T frames, E encoder width, D LLM width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sm_train.data.lengths import num_positions
from sm_train.data.target_set import TargetTable
from sm_train.data.text import normalise
from sm_train.models.llm import FrozenLlm
from sm_train.models.mapper import SpeechMapper
from sm_train.models.speech import CtcHead
from sm_train.prompts import SPEECH
from sm_train.scoring import decode

TOPLINE, CASCADE = "topline", "cascade"


@dataclass(frozen=True, slots=True)
class Heard:
    """An utterance as the systems meet it."""

    feats_TE: NDArray[np.float16]
    text: str
    """The reference transcript; only the topline reads it."""


class System(Protocol):
    """Turns an utterance into vectors of the LLM's input space."""

    name: str
    adapter: Path | None
    """The folder of the LLM's adapter that it was trained with, if it was."""

    def vectors(self, heard: Heard) -> Tensor:
        """What stands in place of the speech [N, D]."""

    def transcript(self, heard: Heard) -> str | None:
        """Its own transcript without the LLM, if it has one."""


class Topline:
    """The reference transcript, as text."""

    name = TOPLINE
    adapter: Path | None = None

    def __init__(self, llm: FrozenLlm, normaliser: str) -> None:
        self.llm, self.normaliser = llm, normaliser

    def vectors(self, heard: Heard) -> Tensor:
        text = normalise(heard.text, self.normaliser)
        return self.llm.embed(self.llm.tokenizer(text, add_special_tokens=False)["input_ids"])

    def transcript(self, heard: Heard) -> str | None:
        return None


class Cascade:
    """A CTC recogniser's transcript, as text."""

    name = CASCADE
    adapter: Path | None = None

    def __init__(self, llm: FrozenLlm, head: CtcHead) -> None:
        self.llm, self.head = llm, head

    def vectors(self, heard: Heard) -> Tensor:
        return self.llm.embed(self.llm.tokenizer(self.transcript(heard), add_special_tokens=False)["input_ids"])

    def transcript(self, heard: Heard) -> str | None:
        return self.head.transcribe(heard.feats_TE)


class Mapped:
    """The mapper's positions, the tail trimmed."""

    def __init__(
        self, mapper: SpeechMapper, targets: TargetTable, trim: str, device: torch.device, name: str,
        adapter: Path | None = None,
    ) -> None:  # fmt: skip
        self.name, self.trim, self.targets, self.device, self.adapter = name, trim, targets, device, adapter
        self.mapper = mapper.to(device).eval()
        self.table_RD = targets.rows_RD.to(device).float()

    @torch.inference_mode()
    def positions(self, heard: Heard) -> Tensor:
        """Every mapped position of an utterance [P, D]."""
        feats_BTE = torch.from_numpy(np.array(heard.feats_TE)).unsqueeze(0).to(self.device)
        length = torch.tensor([feats_BTE.shape[1]], device=self.device)
        mapped_PD: Tensor = self.mapper(feats_BTE, length)[0, : num_positions(feats_BTE.shape[1])]
        return mapped_PD

    def vectors(self, heard: Heard) -> Tensor:
        mapped_PD = self.positions(heard)
        distances_PR = decode.squared_distances(mapped_PD, self.table_RD)
        return mapped_PD[: decode.text_length(distances_PR, self.targets.pad_row, self.trim)]

    def transcript(self, heard: Heard) -> str | None:
        rows = decode.nearest_rows(self.positions(heard), self.table_RD, self.targets.pad_row, self.trim)
        return self.targets.text(rows)


def ask(
    llm: FrozenLlm, messages: Sequence[str], vectors: Sequence[Tensor], max_new_tokens: int, adapter: Path | None
) -> list[str]:
    """Answers to filled messages, each with its vectors in place of ``{speech}``, as one batch.

    Args:
        adapter: the folder of an adapter that the LLM is to have.
    """
    prompts = []
    for message, vectors_ND in zip(messages, vectors, strict=True):
        assert SPEECH in message
        prompts.append(spoken(llm, *llm.chat.halves(message), vectors_ND))
    with llm.adapters.at_work(adapter):
        return llm.answer(prompts, max_new_tokens)


def spoken(llm: FrozenLlm, prefix: Sequence[int], suffix: Sequence[int], vectors_ND: Tensor) -> Tensor:
    """A prompt as the LLM's input embeddings [L, D]: ids, the vectors in place of the speech, ids."""
    return torch.cat([llm.embed(prefix), vectors_ND.to(llm.device, llm.dtype), llm.embed(suffix)])
