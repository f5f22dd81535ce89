"""Nearest-token decoding and where the text ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sm_train.errors import UserError
from sm_train.scoring import decode

R, D, PAD = 12, 8, 4


def table(seed: int = 0, zero_pad: bool = False) -> Tensor:
    table_RD = torch.randn(R, D, generator=torch.Generator().manual_seed(seed))
    if zero_pad:
        table_RD[PAD] = 0.0
    return table_RD


def said(rows: list[int], table_RD: Tensor, noise: float = 0.1) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return table_RD[rows] + noise * torch.randn(len(rows), D, generator=generator)


def test_distances_are_squared_and_fp32() -> None:
    mapped_PD, table_RD = torch.randn(5, D).bfloat16(), table().bfloat16()
    expected = (mapped_PD.double()[:, None] - table_RD.double()).square().sum(dim=-1)
    distances_PR = decode.squared_distances(mapped_PD, table_RD)
    assert distances_PR.dtype == torch.float32
    torch.testing.assert_close(distances_PR.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(40))
def test_the_change_point_is_the_best_of_all(seed: int) -> None:
    """argmin over k of sum_{i<k} min over v != pad |x_i - e_v|^2 + sum_{i>=k} |x_i - e_pad|^2, by trying every k."""
    generator = torch.Generator().manual_seed(seed)
    table_RD, positions = table(seed), int(torch.randint(1, 30, (1,), generator=generator))
    rows = torch.randint(0, R, (positions,), generator=generator)
    rows[positions // 2 :] = PAD
    mapped_PD = table_RD[rows] + torch.randn(positions, D, generator=generator)
    distances_PR = (mapped_PD[:, None] - table_RD).square().sum(dim=-1)
    words = [v for v in range(R) if v != PAD]
    costs = [
        sum(min(float(distances_PR[i, v]) for v in words) for i in range(k))
        + sum(float(distances_PR[i, PAD]) for i in range(k, positions))
        for k in range(positions + 1)
    ]
    assert decode.change_point(decode.squared_distances(mapped_PD, table_RD), PAD) == int(np.argmin(costs))


def test_a_doubtful_word_nearest_to_a_zero_pad_cuts_by_first_pad_only() -> None:
    table_RD = table(zero_pad=True)
    mapped_PD = said([1, 2, 3, 5, 6, 7, PAD, PAD, PAD, PAD], table_RD)
    mapped_PD[2] = 0.3 * table_RD[3]  # the mapper is in doubt: shrunk towards zero, where the pad lies
    distances_PR = decode.squared_distances(mapped_PD, table_RD)
    assert int(distances_PR[2].argmin()) == PAD
    assert decode.text_length(distances_PR, PAD, "first_pad") == 2
    assert decode.text_length(distances_PR, PAD, "change_point") == 6
    assert decode.text_length(distances_PR, PAD, "none") == 10
    assert decode.nearest_rows(mapped_PD, table_RD, PAD).tolist() == [1, 2, 5, 6, 7]
    assert decode.nearest_rows(mapped_PD, table_RD, PAD, "first_pad").tolist() == [1, 2]


def test_a_word_like_pad_in_the_tail_does_not_lengthen_the_text() -> None:
    table_RD = table()
    mapped_PD = said([1, 2, PAD, PAD, PAD, PAD, PAD], table_RD)
    mapped_PD[5] = 0.45 * table_RD[PAD] + 0.55 * table_RD[3]
    distances_PR = decode.squared_distances(mapped_PD, table_RD)
    assert int(distances_PR[5].argmin()) == 3
    assert decode.nearest_rows(mapped_PD, table_RD, PAD).tolist() == [1, 2]
    assert decode.nearest_rows(mapped_PD, table_RD, PAD, "none").tolist() == [1, 2, 3]


@pytest.mark.parametrize("zero_pad", [False, True])
@pytest.mark.parametrize("trim", decode.TRIMS)
def test_all_text_and_all_pad(trim: str, zero_pad: bool) -> None:
    table_RD = table(zero_pad=zero_pad)
    assert decode.nearest_rows(said([1, 2, 3], table_RD), table_RD, PAD, trim).tolist() == [1, 2, 3]
    assert decode.nearest_rows(said([PAD] * 3, table_RD), table_RD, PAD, trim).tolist() == []
    assert decode.nearest_rows(said([5], table_RD), table_RD, PAD, trim).tolist() == [5]


def test_an_unknown_trim_is_an_error() -> None:
    with pytest.raises(UserError, match="trim is 'tail'; it must be one of change_point, first_pad, none"):
        decode.nearest_rows(said([1], table()), table(), PAD, "tail")
