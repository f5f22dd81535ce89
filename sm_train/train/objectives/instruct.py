"""Stage 2 of the paper: the mapped positions stand in the LLM's prompt, and the frozen LLM is to give the answer.

    L = (1 - sigma) * CE + sigma * (alpha * S_word / N_word + (10 - alpha) * S_pad / N_pad)

CE is the cross-entropy of the answer's tokens, the end of the turn included; the squared errors are stage 1's, over all
positions (SpeechMapper, arXiv 2601.20417).
Shape letters: B items, P positions, L tokens of a row, A answer tokens, D LLM width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from sm_train import config
from sm_train.data.batches import Columns
from sm_train.data.instructions import IGNORED
from sm_train.models import adapter
from sm_train.models.mapper import SpeechMapper, mask, positions_of
from sm_train.records import PromptedBatch
from sm_train.train.objectives.padded import PaddedRegression


@dataclass(frozen=True)
class InstructConfig:
    """Weights of the two losses."""

    sigma: float = config.key(0.9, "share of the squared error to the targets; 0 is cross-entropy alone")
    alpha: float = config.key(5.0, "weight of the words' squared error; the pads' is 10 - alpha")
    mse: str = config.key(
        "relative", "relative: divided by the targets' mean square | sum: over the width (the paper's)"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.sigma < 1:
            raise ValueError(f"objective.sigma is {self.sigma:g}; it must lie in [0, 1)")
        if not 0 <= self.alpha <= 10:
            raise ValueError(f"objective.alpha is {self.alpha:g}; it must lie in [0, 10]")
        if self.mse not in ("relative", "sum"):
            raise ValueError(f"objective.mse is {self.mse!r}; it must be relative or sum")


class InstructObjective(nn.Module):
    """The mapper and the frozen LLM as one module that returns sums by term.

    1. The mapper turns features into positions.
    2. The LLM's own input embedding turns the ids around them into vectors; the positions take their places.
    3. The LLM runs on the vectors, and its own head on the last A places of each row, where answers end together.
    """

    measures: tuple[str, ...] = ("accuracy", "llm_tokens")
    """The share of answer tokens that are the likeliest, and the tokens that the LLM reads of an item."""
    llm: Any
    """The frozen causal LM; given later, so that it can be loaded where an engine lays it out over the ranks."""

    def __init__(
        self, mapper: SpeechMapper, regression: PaddedRegression, cfg: InstructConfig, splice: str = "all"
    ) -> None:
        super().__init__()
        self.mapper, self.regression, self.has_all = mapper, regression, splice == "all"
        self.weights = {"ce": 1.0 - cfg.sigma}
        if cfg.sigma > 0:
            self.weights |= {"word": cfg.sigma * cfg.alpha, "pad": cfg.sigma * (10.0 - cfg.alpha)}

    def train(self, mode: bool = True) -> InstructObjective:
        """Training is the mapper's; the LLM keeps the behaviour it has when it answers."""
        super().train(mode)
        # Transformers recomputes activations in training mode only, which changes nothing else without dropout.
        self.llm.train(mode and self.llm.is_activation_checkpointing)
        adapter.train(self.llm, mode)
        return self

    def counts(self, columns: Columns) -> dict[str, NDArray[np.int64]]:
        """Answer tokens of each item, and positions of each regression term [N]."""
        answers = columns["num_answer_tokens"]
        items = np.ones_like(answers)
        return {"ce": answers, "accuracy": answers, "llm_tokens": items, **self.regression.counts(columns)}

    def forward(self, batch: PromptedBatch) -> dict[str, Tensor]:
        """Sums by term over the micro-batch, in fp32."""
        mapped_BPD = self.mapper(batch.speech.feats_BTE, batch.speech.num_frames_B)
        logits_BAV = self.answer_logits(mapped_BPD, batch).float()
        is_asked_BA = batch.answer_ids_BA != IGNORED
        logits, wanted = logits_BAV[is_asked_BA], batch.answer_ids_BA[is_asked_BA]
        sums = {
            "ce": F.cross_entropy(logits, wanted, reduction="sum"),
            "accuracy": (logits.detach().argmax(dim=-1) == wanted).float().sum(),
            "llm_tokens": batch.is_real_BL.sum().float(),
        }
        if "word" in self.weights:
            sums |= self.regression.sums(mapped_BPD, batch.speech)
        return sums

    def answer_logits(self, mapped_BPD: Tensor, batch: PromptedBatch) -> Tensor:
        """The LLM's logits [B, A, V] of the last A places, each for the token that follows it."""
        embeds_BLD = self.llm.get_input_embeddings()(batch.ids_BL)
        positions_B = positions_of(batch.speech.num_frames_B)
        if not self.has_all:
            positions_B = torch.minimum(positions_B, batch.speech.num_tokens_B)
        is_position_BP = mask(positions_B, mapped_BPD.shape[1])
        embeds_BLD = splice(embeds_BLD, batch.is_speech_BL, mapped_BPD[is_position_BP])
        # Counted from each row's first token, as the LLM's own decoding does with left-padded rows.
        places_BL = (batch.is_real_BL.cumsum(dim=1) - 1).clamp(min=0)
        out = self.llm(
            inputs_embeds=embeds_BLD, attention_mask=batch.is_real_BL.long(), position_ids=places_BL, use_cache=False,
            logits_to_keep=batch.answer_ids_BA.shape[1],
        )  # fmt: skip
        logits_BAV: Tensor = out.logits
        return logits_BAV


def splice(embeds_BLD: Tensor, is_speech_BL: Tensor, mapped_ND: Tensor) -> Tensor:
    """Put mapped positions, all items' in a row [N, D], where ``is_speech`` is true.

    Raises:
        ValueError: there are more or fewer places than positions.
    """
    num_places = int(is_speech_BL.sum())
    if num_places != len(mapped_ND):
        raise ValueError(f"{num_places} places for {len(mapped_ND)} mapped positions")
    return embeds_BLD.masked_scatter(is_speech_BL[..., None], mapped_ND.to(embeds_BLD.dtype))
