"""Characters and words by CTC at 25 Hz: what trains the miniature's speech encoder, and how its quality is told.

Shape letters: B items, T encoder frames (50 Hz), P pooled frames (25 Hz), E encoder width, V labels.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import ctc_loss

BLANK = "<blank>"
CHARACTERS = [BLANK, " ", "'", *string.ascii_lowercase]


class CtcBatch(NamedTuple):
    """Utterances of one step."""

    feats_BTE: torch.Tensor
    mask_BT: torch.Tensor
    texts: list[str]


class CtcHead(torch.nn.Linear):
    """Scores of labels, characters or words, from encoder frames, two frames averaged first."""

    def __init__(self, width: int, labels: list[str] = CHARACTERS, separator: str = "") -> None:
        super().__init__(width, len(labels))
        self.labels, self.separator = labels, separator
        self._row = {label: row for row, label in enumerate(labels)}

    def loss(self, scores_BPV: torch.Tensor, lengths_B: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """The CTC loss a label, averaged over utterances."""
        labels = [[self._row[label] for label in (text.split() if self.separator else text)] for text in texts]
        flat = torch.tensor([label for row in labels for label in row])
        sizes_B = torch.tensor([len(row) for row in labels])
        log_probs_PBV = scores_BPV.float().log_softmax(-1).transpose(0, 1)
        return ctc_loss(log_probs_PBV, flat, lengths_B, sizes_B, zero_infinity=True)

    def texts(self, scores_BPV: torch.Tensor, lengths_B: torch.Tensor) -> list[str]:
        """Best path: repeats merged, blanks dropped."""
        texts = []
        for path_P, length in zip(scores_BPV.argmax(-1), lengths_B, strict=True):
            merged = torch.unique_consecutive(path_P[:length]).tolist()
            texts.append(self.separator.join(self.labels[row] for row in merged if row != 0))
        return texts

    def save(self, folder: Path) -> None:
        """Write ``ctc_head.safetensors`` and ``ctc_vocabulary.json`` beside the encoder."""
        tensors = {name: tensor.half().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / "ctc_head.safetensors")
        (folder / "ctc_vocabulary.json").write_text(json.dumps(self.labels) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> CtcHead:
        """The head of characters that :meth:`save` wrote."""
        tensors = {name: tensor.float() for name, tensor in load_file(folder / "ctc_head.safetensors").items()}
        head = cls(tensors["weight"].shape[1])
        head.load_state_dict(tensors)
        return head


def pool_pairs(hidden_BTE: torch.Tensor, mask_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of every two frames, a last odd one alone, and the pooled lengths."""
    batch, frames, width = hidden_BTE.shape
    odd = frames % 2
    hidden_BTE = torch.nn.functional.pad(hidden_BTE, (0, 0, 0, odd))
    weight_BT1 = torch.nn.functional.pad(mask_BT, (0, odd)).to(hidden_BTE.dtype)[..., None]
    summed_BPE = (hidden_BTE * weight_BT1).view(batch, -1, 2, width).sum(2)
    counts_BP1 = weight_BT1.view(batch, -1, 2, 1).sum(2)
    return summed_BPE / counts_BP1.clamp(min=1), (mask_BT.sum(1) + 1) // 2


def word_errors(reference: str, hypothesis: str) -> int:
    """The edit distance in words."""
    left, right = reference.split(), hypothesis.split()
    row = np.arange(len(right) + 1)
    for index, word in enumerate(left, start=1):
        previous, row = row, np.empty_like(row)
        row[0] = index
        for column, other in enumerate(right, start=1):
            row[column] = min(previous[column] + 1, row[column - 1] + 1, previous[column - 1] + (word != other))
    return int(row[-1])


def word_error_rate(references: list[str], hypotheses: list[str]) -> tuple[float, float, float]:
    """Errors over reference words of the whole list, and its 95% interval by bootstrap over utterances."""
    errors = np.array([word_errors(r, h) for r, h in zip(references, hypotheses, strict=True)])
    words = np.array([len(reference.split()) for reference in references])
    draws = np.random.default_rng(0).integers(len(words), size=(1000, len(words)))
    rates = errors[draws].sum(1) / words[draws].sum(1)
    return float(errors.sum() / words.sum()), float(np.quantile(rates, 0.025)), float(np.quantile(rates, 0.975))
