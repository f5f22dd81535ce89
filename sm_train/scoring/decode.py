"""Reading text off mapped positions without an LLM: the nearest token of each, and where the text ends.

Shape letters: B items, P positions, R rows of the target table, D LLM width.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sm_train.errors import UserError

TRIMS = ("change_point", "first_pad", "none")


def squared_distances(mapped_PD: Tensor, table_RD: Tensor) -> Tensor:
    """|x_i - e_v|^2 of every position and row [P, R], in fp32."""
    mapped_PD, table_RD = mapped_PD.float(), table_RD.float()
    cross_PR = mapped_PD @ table_RD.T
    return mapped_PD.square().sum(dim=1, keepdim=True) + table_RD.square().sum(dim=1) - 2 * cross_PR


def change_point(distances_PR: Tensor, pad_row: int) -> int:
    """How many positions hold text: argmin over k of (nearest word before k) + (distance to the pad from k on).

    One doubtful position that is nearest to the pad does not end the text, as it does with the first-pad rule.
    """
    to_pad_P = distances_PR[:, pad_row]
    words_PR = distances_PR.clone()
    words_PR[:, pad_row] = torch.inf
    gain_P = words_PR.min(dim=1).values - to_pad_P
    costs = torch.cat([gain_P.new_zeros(1), gain_P.cumsum(dim=0)])
    return int(costs.argmin())


def text_length(distances_PR: Tensor, pad_row: int, trim: str) -> int:
    """The number of leading positions that hold text, by one of :data:`TRIMS`."""
    if trim == "change_point":
        return change_point(distances_PR, pad_row)
    if trim == "none":
        return len(distances_PR)
    if trim != "first_pad":
        raise UserError(f"trim is {trim!r}; it must be one of {', '.join(TRIMS)}")
    is_pad = (distances_PR.argmin(dim=1) == pad_row).nonzero()
    return int(is_pad[0]) if len(is_pad) else len(distances_PR)


def nearest_rows(mapped_PD: Tensor, table_RD: Tensor, pad_row: int, trim: str = "change_point") -> NDArray[np.int64]:
    """The nearest row of each position of the text, pads inside it left out."""
    distances_PR = squared_distances(mapped_PD, table_RD)
    length = text_length(distances_PR, pad_row, trim)
    rows: NDArray[np.int64] = distances_PR[:length].argmin(dim=1).cpu().numpy()
    words: NDArray[np.int64] = rows[rows != pad_row]
    return words
