"""Stage 1 of the paper: regress the transcript's input embeddings, the tail filled with the pad's embedding.

    L = alpha * S_word / N_word + (10 - alpha) * S_pad / N_pad - gamma * S_cos / N_cos

S_word covers the tokens and the first pad, S_pad the other pads; S is a sum of squared errors over positions, N the
count of the global step (SpeechMapper, arXiv 2601.20417).
Shape letters: B items, P positions, L tokens, R table rows, D LLM width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from sm_train import config
from sm_train.data.batches import Columns
from sm_train.data.lengths import num_positions
from sm_train.models.mapper import SpeechMapper, mask, positions_of
from sm_train.records import Batch


@dataclass(frozen=True)
class PaddedConfig:
    """Weights and scale of the padded objective."""

    alpha: float = config.key(5.0, "weight of the words' squared error; the pads' is 10 - alpha")
    gamma: float = config.key(20.0, "weight of the cosine (the paper: 100, with mse: sum)")
    mse: str = config.key(
        "relative", "relative: divided by the targets' mean square | sum: over the width (the paper's)"
    )
    cosine: str = config.key("words", "positions the cosine covers: words | all")

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 10:
            raise ValueError(f"objective.alpha is {self.alpha:g}; it must lie in [0, 10]")
        if self.mse not in ("relative", "sum"):
            raise ValueError(f"objective.mse is {self.mse!r}; it must be relative or sum")
        if self.cosine not in ("words", "all"):
            raise ValueError(f"objective.cosine is {self.cosine!r}; it must be words or all")


class PaddedRegression:
    """The padded targets and the sums of each term, for positions that a mapper has given.

    No module: the table stays in fp32 where an engine casts the module, and no checkpoint holds it.
    """

    def __init__(self, table_RD: Tensor, pad_row: int, mean_square: float, mse: str, cosine: str) -> None:
        self.table_RD, self.pad_row, self.cosine = table_RD.float(), pad_row, cosine
        self.scale = 1.0 if mse == "sum" else 1.0 / (table_RD.shape[1] * mean_square)

    def counts(self, columns: Columns) -> dict[str, NDArray[np.int64]]:
        """Positions of each term in each item [N]."""
        positions = num_positions(columns["num_frames"])
        words = np.minimum(columns["num_tokens"] + 1, positions)
        return {"word": words, "pad": positions - words, "cos": words if self.cosine == "words" else positions}

    def sums(self, mapped_BPD: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Sums by term over the micro-batch, in fp32."""
        mapped_BPD = mapped_BPD.float()
        targets_BPD = self.targets(batch, mapped_BPD.shape[1])
        positions_B = positions_of(batch.num_frames_B)
        words_B = torch.minimum(batch.num_tokens_B + 1, positions_B)
        real_BP, word_BP = (mask(lengths, mapped_BPD.shape[1]) for lengths in (positions_B, words_B))
        # Where there is nothing, zeros: a stray NaN beyond the length must reach no sum and no gradient.
        mapped_BPD = mapped_BPD.masked_fill(~real_BP[..., None], 0.0)
        squared_BP = (mapped_BPD - targets_BPD).square().sum(dim=-1) * self.scale
        cosine_BP = F.cosine_similarity(mapped_BPD, targets_BPD, dim=-1, eps=1e-8)
        covered_BP = word_BP if self.cosine == "words" else real_BP
        return {
            "word": squared_BP[word_BP].sum(),
            "pad": squared_BP[real_BP & ~word_BP].sum(),
            "cos": cosine_BP[covered_BP].sum(),
        }

    def targets(self, batch: Batch, num_positions: int) -> Tensor:
        """The targets [B, P, D]: token embeddings, then the pad's."""
        rows_BL = batch.token_rows_BL[:, :num_positions]
        rows_BP = F.pad(rows_BL, (0, num_positions - rows_BL.shape[1]), value=self.pad_row)
        self.table_RD = self.table_RD.to(rows_BP.device)
        return self.table_RD[rows_BP]


class PaddedObjective(nn.Module):
    """The mapper and its regression, as one module that returns sums by term."""

    measures: tuple[str, ...] = ()

    def __init__(self, mapper: SpeechMapper, regression: PaddedRegression, cfg: PaddedConfig) -> None:
        super().__init__()
        self.mapper, self.regression = mapper, regression
        self.counts = regression.counts
        self.weights = {"word": cfg.alpha, "pad": 10.0 - cfg.alpha, "cos": -cfg.gamma}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sums by term over the micro-batch, in fp32."""
        return self.regression.sums(self.mapper(batch.feats_BTE, batch.num_frames_B), batch)
