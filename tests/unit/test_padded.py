"""The padded objective against the formulas, written out position by position in numpy.

Shape letters: B items, T frames, P positions, L tokens, R table rows, D target width.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sm_train.models.mapper import positions_of
from sm_train.records import Batch
from sm_train.train.objectives.padded import PaddedConfig, PaddedObjective, PaddedRegression

D, R, PAD = 6, 9, 3
# (frames, tokens): P > L + 1, P = L + 1, P = L, one position, P > L + 1 with frames that fill no position.
ITEMS = [(32, 3), (20, 4), (20, 5), (4, 1), (27, 2)]
CHOICES = [(mse, cosine) for mse in ("sum", "relative") for cosine in ("words", "all")]


class Fixed(nn.Module):
    """Stands where the mapper stands, and returns what it was given."""

    def __init__(self, mapped_BPD: Tensor) -> None:
        super().__init__()
        self.mapped_BPD = nn.Parameter(mapped_BPD)

    def forward(self, feats_BTE: Tensor, num_frames_B: Tensor) -> Tensor:
        return self.mapped_BPD[:, : feats_BTE.shape[1] // 4]


def world(items: list[tuple[int, int]] = ITEMS, seed: int = 0) -> tuple[Batch, Tensor, Tensor]:
    """A micro-batch, what the mapper makes of it, and the table."""
    generator = torch.Generator().manual_seed(seed)
    frames, tokens = (torch.tensor(column) for column in zip(*items, strict=True))
    rows_BL = torch.full((len(items), int(tokens.max())), PAD)
    for b, num_tokens in enumerate(tokens.tolist()):
        drawn = torch.randint(0, R - 1, (num_tokens,), generator=generator)
        rows_BL[b, :num_tokens] = drawn + (drawn >= PAD)  # no token is the pad
    batch = Batch(torch.zeros(len(items), int(frames.max()), 1), frames, rows_BL, tokens, np.arange(len(items)))
    mapped_BPD = torch.randn(len(items), int(frames.max()) // 4, D, generator=generator)
    return batch, mapped_BPD, torch.randn(R, D, generator=generator)


def objective(mapped_BPD: Tensor, table_RD: Tensor, mean_square: float = 1.7, **settings: object) -> PaddedObjective:
    cfg = PaddedConfig(**settings)  # type: ignore[arg-type]
    regression = PaddedRegression(table_RD, PAD, mean_square, cfg.mse, cfg.cosine)
    return PaddedObjective(Fixed(mapped_BPD), regression, cfg)  # type: ignore[arg-type]


def columns(items: list[tuple[int, int]]) -> dict[str, np.ndarray]:
    frames, tokens = zip(*items, strict=True)
    return {"num_frames": np.array(frames), "num_tokens": np.array(tokens)}


def slow(batch: Batch, mapped_BPD: Tensor, table_RD: Tensor, mse: str, cosine: str, mean_square: float
         ) -> tuple[dict[str, float], dict[str, list[int]]]:  # fmt: skip
    """Sums and counts by item of DESIGN section 5, one position after the other, in float64."""
    sums = {"word": 0.0, "pad": 0.0, "cos": 0.0}
    counts: dict[str, list[int]] = {"word": [], "pad": [], "cos": []}
    table = table_RD.double().numpy()
    for b, (frames, tokens) in enumerate(zip(batch.num_frames_B.tolist(), batch.num_tokens_B.tolist(), strict=True)):
        for per_item in counts.values():
            per_item.append(0)
        for i in range(frames // 4):
            row = int(batch.token_rows_BL[b, i]) if i < tokens else PAD
            x, e = mapped_BPD[b, i].double().detach().numpy(), table[row]
            squared = sum((float(x[d]) - float(e[d])) ** 2 for d in range(D))
            term = "word" if i <= tokens else "pad"  # the tokens and the first pad, then the other pads
            sums[term] += squared if mse == "sum" else squared / (D * mean_square)
            counts[term][-1] += 1
            if term == "word" or cosine == "all":
                sums["cos"] += float(x @ e) / (math.sqrt(float(x @ x)) * math.sqrt(float(e @ e)))
                counts["cos"][-1] += 1
    return sums, counts


@pytest.mark.parametrize(("mse", "cosine"), CHOICES)
@pytest.mark.parametrize("seed", range(3))
def test_sums_and_counts_are_those_of_the_formulas(mse: str, cosine: str, seed: int) -> None:
    batch, mapped_BPD, table_RD = world(seed=seed)
    expected, counts = slow(batch, mapped_BPD, table_RD, mse, cosine, 1.7)
    made = objective(mapped_BPD, table_RD, mse=mse, cosine=cosine)
    sums = made(batch)
    assert {name: value.item() for name, value in sums.items()} == pytest.approx(expected, rel=1e-5)
    assert {name: count.tolist() for name, count in made.counts(columns(ITEMS)).items()} == counts


def test_the_terms_of_one_utterance_by_hand() -> None:
    """Two tokens, five positions: words are positions 0 to 2 (the first pad among them), pads 3 and 4."""
    batch, mapped_BPD, table_RD = world([(20, 2)])
    targets_PD = table_RD[torch.cat([batch.token_rows_BL[0], torch.full((3,), PAD)])]
    made = objective(mapped_BPD, table_RD, mse="sum")
    sums = made(batch)
    errors_P = (mapped_BPD[0] - targets_PD).square().sum(dim=1)
    assert float(sums["word"]) == pytest.approx(float(errors_P[:3].sum()), rel=1e-5)
    assert float(sums["pad"]) == pytest.approx(float(errors_P[3:].sum()), rel=1e-5)
    assert {name: int(count[0]) for name, count in made.counts(columns([(20, 2)])).items()} == {
        "word": 3,
        "pad": 2,
        "cos": 3,
    }
    assert torch.equal(made.regression.targets(batch, 5)[0], targets_PD)


def test_a_batch_is_the_sum_of_its_items() -> None:
    batch, mapped_BPD, table_RD = world()
    together = objective(mapped_BPD, table_RD)(batch)
    alone = {"word": 0.0, "pad": 0.0, "cos": 0.0}
    for b, (frames, tokens) in enumerate(ITEMS):
        one = Batch(
            batch.feats_BTE[b : b + 1, :frames], batch.num_frames_B[b : b + 1], batch.token_rows_BL[b : b + 1, :tokens],
            batch.num_tokens_B[b : b + 1], batch.ordinals[b : b + 1],
        )  # fmt: skip
        for name, value in objective(mapped_BPD[b : b + 1], table_RD)(one).items():
            alone[name] += float(value)
    assert {name: float(value) for name, value in together.items()} == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("cosine", ["words", "all"])
@pytest.mark.parametrize("stray", [float("nan"), float("inf")])
def test_what_stands_beyond_a_length_reaches_no_sum_and_no_gradient(cosine: str, stray: float) -> None:
    batch, mapped_BPD, table_RD = world()
    real_BP = torch.arange(mapped_BPD.shape[1]) < positions_of(batch.num_frames_B)[:, None]
    soiled = mapped_BPD.clone()
    soiled[~real_BP] = stray
    clean, other = objective(mapped_BPD, table_RD, cosine=cosine), objective(soiled, table_RD, cosine=cosine)
    gradients = []
    for made in (clean, other):
        sums = made(batch)
        sum(sums.values()).backward()  # type: ignore[union-attr]
        gradients.append(made.mapper.mapped_BPD.grad)
    assert {k: float(v) for k, v in clean(batch).items()} == {k: float(v) for k, v in other(batch).items()}
    assert torch.equal(gradients[0], gradients[1])
    assert (gradients[1][~real_BP] == 0).all()


@pytest.mark.parametrize("cosine", ["words", "all"])
def test_a_pad_row_of_zero_keeps_gradients_finite(cosine: str) -> None:
    batch, mapped_BPD, table_RD = world()
    table_RD[PAD] = 0.0
    made = objective(mapped_BPD, table_RD, cosine=cosine)
    sum(made(batch).values()).backward()  # type: ignore[union-attr]
    assert torch.isfinite(made.mapper.mapped_BPD.grad).all()  # type: ignore[arg-type]


def test_sums_are_fp32_whatever_the_mapper_is() -> None:
    batch, mapped_BPD, table_RD = world()
    sums = objective(mapped_BPD.bfloat16(), table_RD.bfloat16())(batch)
    assert {value.dtype for value in sums.values()} == {torch.float32}


def test_weights_are_those_of_the_loss() -> None:
    _, mapped_BPD, table_RD = world()
    assert objective(mapped_BPD, table_RD, alpha=7.0, gamma=100.0).weights == {"word": 7.0, "pad": 3.0, "cos": -100.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"alpha": 11.0}, "alpha is 11"), ({"mse": "mean"}, "mse is 'mean'"), ({"cosine": "pads"}, "cosine is 'pads'")],
)
def test_bad_settings_are_errors(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PaddedConfig(**settings)  # type: ignore[arg-type]
