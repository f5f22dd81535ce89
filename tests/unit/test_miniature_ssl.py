"""BEST-RQ on the miniature's encoder."""

from __future__ import annotations

import numpy as np
import torch

from tools.miniature.build_encoder import new_encoder
from tools.miniature.build_ssl import Predictor, Quantiser, SslConfig, _every_layer, _spans
from tools.miniature.ctc import CtcBatch

TINY = SslConfig(
    width=16, feed_forward=32, layers=1, heads=2, kernel=5, codebooks=2, codes=8, code_width=4, mask_frames=5
)


def batch_of(items: int = 8, frames: int = 60) -> CtcBatch:
    """Four sounds in a fixed order, ten frames each, under a little noise."""
    sounds = torch.randn(4, 160)
    feats_BTF = sounds[torch.arange(frames) // 10 % 4].expand(items, -1, -1) + 0.1 * torch.randn(items, frames, 160)
    mask_BT = torch.ones(items, frames, dtype=torch.long)
    mask_BT[0, frames // 2 :] = 0
    return CtcBatch(feats_BTF, mask_BT, [""] * items)


def test_loss_on_masked_frames_falls_below_chance() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    predictor, quantiser, batch = Predictor(new_encoder(TINY), TINY), Quantiser(160, TINY), batch_of()
    books = quantiser.books_QVC.clone()
    optimizer = torch.optim.AdamW([*predictor.parameters(), *quantiser.parameters()], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = predictor.loss(batch, quantiser, rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.7 * np.log(TINY.codes)
    assert torch.equal(quantiser.books_QVC, books)


def test_spans_are_inside_the_utterance_and_of_their_length() -> None:
    mask_BT = torch.tensor([[1] * 40, [1] * 3 + [0] * 37])
    masked_BT = _spans(mask_BT, TINY, np.random.default_rng(0))
    assert masked_BT.any(1).all()
    assert not (masked_BT & ~mask_BT.bool()).any()
    many_BT = _spans(torch.ones(50, 400, dtype=torch.long), SslConfig(), np.random.default_rng(0))
    assert 0.25 < many_BT.float().mean() < 0.45  # 1 - 0.98 ** 20 = 0.33


def test_codes_depend_on_direction_alone() -> None:
    torch.manual_seed(0)
    quantiser, feats_BTF = Quantiser(160, TINY), torch.randn(2, 9, 160)
    codes_BTQ = quantiser(feats_BTF)
    assert codes_BTQ.shape == (2, 9, 2)
    assert torch.equal(codes_BTQ, quantiser(3.0 * feats_BTF))
    assert len(codes_BTQ.unique()) > 4


def test_probes_see_input_every_layer_and_the_output() -> None:
    torch.manual_seed(0)
    encoder, batch = new_encoder(TINY).eval(), batch_of(2, 20)
    found = _every_layer(encoder, batch)
    assert [x_BPE.shape[2] for x_BPE, _ in found] == [160, 16, 16]
    assert all(lengths_B.tolist() == [5, 10] for _, lengths_B in found)
