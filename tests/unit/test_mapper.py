"""The mapper: size, padding, lengths, and that a layer is PyTorch's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sm_train.errors import UserError
from sm_train.models.mapper import (
    PAPER_PARAMETERS,
    Layer,
    MapperConfig,
    SpeechMapper,
    mask,
    position_angles,
    positions_of,
)

E, D = 16, 24
CHOICES = [(norm, positions) for norm in ("pre", "post") for positions in ("rotary", "sinusoidal")]


def tiny(norm: str = "pre", positions: str = "rotary", **settings: object) -> MapperConfig:
    values: dict[str, object] = {"widths": [E, 16, 32], "layers": 2, "heads": 2, "feed_forward": 24, **settings}
    return MapperConfig(norm=norm, positions=positions, **values)  # type: ignore[arg-type]


def mapper(norm: str = "pre", positions: str = "rotary", **settings: object) -> SpeechMapper:
    torch.manual_seed(0)
    made = SpeechMapper(tiny(norm, positions, **settings), E, D).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # so that no bias or gain is left at 0 or 1
    return made


def feats(*lengths: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(lengths), max(lengths), E, generator=generator), torch.tensor(lengths)


def test_the_paper_s_size_has_277_031_936_parameters() -> None:
    cfg = MapperConfig(norm="post", positions="sinusoidal", activation="relu", layers=6, feed_forward=2048)
    with torch.device("meta"):
        made = SpeechMapper(cfg, 1024, 4096)
    assert made.num_parameters == PAPER_PARAMETERS == 277_031_936


@pytest.mark.parametrize(("norm", "positions"), CHOICES)
def test_padding_and_neighbours_change_nothing(norm: str, positions: str) -> None:
    made = mapper(norm, positions)
    x_BTE, lengths_B = feats(41, 4, 22, 7, 35, 18)
    x_BTE[~mask(lengths_B, 41)] = float("nan")  # garbage beyond each length
    together = made(x_BTE, lengths_B)
    for b, length in enumerate(lengths_B.tolist()):
        alone = made(x_BTE[b : b + 1, :length], lengths_B[b : b + 1])
        assert alone.shape[1] == length // 4
        torch.testing.assert_close(together[b : b + 1, : length // 4], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frames", range(4, 41))
def test_positions_are_a_quarter_of_the_frames(frames: int) -> None:
    x_BTE, lengths_B = feats(frames)
    assert mapper()(x_BTE, lengths_B).shape == (1, frames // 4, D)
    assert positions_of(lengths_B).tolist() == [frames // 4]


@pytest.mark.parametrize(("norm", "positions"), CHOICES)
def test_four_times_the_longest_training_length_is_finite(norm: str, positions: str) -> None:
    x_BTE, lengths_B = feats(4 * 1000, 250)  # the paper's longest utterances have 40 s, 1000 frames
    mapped_BPD = mapper(norm, positions)(x_BTE, lengths_B)
    assert mapped_BPD.shape == (2, 1000, D)
    assert torch.isfinite(mapped_BPD).all()


@pytest.mark.parametrize(("norm", "positions"), CHOICES)
def test_order_matters(norm: str, positions: str) -> None:
    """Without positions, two equal frames in another order would only swap outputs far from the seam."""
    made = mapper(norm, positions)
    x_BTE, lengths_B = feats(64)
    constant = x_BTE[:, :1].expand(1, 64, E)
    mapped_PD = made(constant, lengths_B)[0]
    if positions == "sinusoidal":  # every position differs although every frame is the same
        assert (mapped_PD[4] - mapped_PD[8]).abs().max() > 1e-3
    moved = torch.roll(x_BTE, 32, dims=1)
    assert (made(moved, lengths_B)[0, 8 + 2] - made(x_BTE, lengths_B)[0, 2]).abs().max() > 1e-3


def test_rotary_attention_sees_distances_only() -> None:
    q_TH, k_TH = torch.randn(2, 1, 1, 50, 8)
    angles_TH = position_angles(90, 8, torch.device("cpu"))
    from sm_train.models.mapper import rotate

    here = rotate(q_TH, angles_TH[:50]) @ rotate(k_TH, angles_TH[:50]).transpose(-1, -2)
    later = rotate(q_TH, angles_TH[40:]) @ rotate(k_TH, angles_TH[40:]).transpose(-1, -2)
    torch.testing.assert_close(here, later, rtol=1e-4, atol=1e-4)
    assert (here - q_TH @ k_TH.transpose(-1, -2)).abs().max() > 0.1


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_layer_is_torch_s_encoder_layer(norm: str, activation: str) -> None:
    width = 16
    layer = Layer(width, tiny(norm, "sinusoidal", activation=activation, dropout=0.0))
    reference = nn.TransformerEncoderLayer(
        width, 2, 24, dropout=0.0, activation=activation, batch_first=True, norm_first=norm == "pre"
    )
    names = {"self_attn.in_proj_": "qkv.", "self_attn.out_proj.": "out.", "linear1.": "up.", "linear2.": "down.",
             "norm1.": "attention_norm.", "norm2.": "feed_forward_norm."}  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    state = {name: torch.randn(t.shape, generator=generator) * 0.3 for name, t in reference.state_dict().items()}
    reference.load_state_dict(state)
    for theirs, ours in names.items():
        state = {name.replace(theirs, ours): tensor for name, tensor in state.items()}
    layer.load_state_dict(state)
    x_BTD, keep_BT = torch.randn(3, 11, width, generator=generator), mask(torch.tensor([11, 4, 1]), 11)
    ours_BTD = layer(x_BTD, keep_BT[:, None, None, :], position_angles(11, 8, x_BTD.device))
    theirs_BTD = reference(x_BTD, src_key_padding_mask=~keep_BT)
    torch.testing.assert_close(ours_BTD[keep_BT], theirs_BTD[keep_BT], rtol=1e-5, atol=1e-5)


def test_dropout_is_of_training_only_and_seeded() -> None:
    made = mapper(dropout=0.3)
    x_BTE, lengths_B = feats(40)
    still = made(x_BTE, lengths_B)
    assert torch.equal(still, made(x_BTE, lengths_B))
    made.train()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(made(x_BTE, lengths_B))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0], still)


def test_output_rms_scales_the_output() -> None:
    one, scaled = mapper(), mapper()
    scaled.output_rms = 0.25
    x_BTE, lengths_B = feats(20)
    torch.testing.assert_close(scaled(x_BTE, lengths_B), 0.25 * one(x_BTE, lengths_B))


def save(made: SpeechMapper, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(made.description()))
    save_file(made.state_dict(), folder / "mapper.safetensors")
    return folder


@pytest.mark.parametrize(("norm", "positions"), CHOICES)
def test_a_saved_mapper_comes_back(tmp_path: Path, norm: str, positions: str) -> None:
    made = mapper(norm, positions, activation="relu")
    made.output_rms = 0.5
    loaded = SpeechMapper.from_pretrained(save(made, tmp_path))
    assert (loaded.cfg, loaded.output_width, loaded.output_rms) == (made.cfg, D, 0.5)
    assert not loaded.training
    x_BTE, lengths_B = feats(20, 9)
    assert torch.equal(loaded(x_BTE, lengths_B), made(x_BTE, lengths_B))


def test_what_is_no_mapper_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        SpeechMapper.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="holds no mapper: model_type is 'llama'"):
        SpeechMapper.from_pretrained(tmp_path)
    folder = save(mapper(), tmp_path)
    weights = folder / "mapper.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="holds no whole mapper"):
        SpeechMapper.from_pretrained(folder)
    save_file({"one": torch.zeros(1)}, weights)
    with pytest.raises(UserError, match="holds no whole mapper"):
        SpeechMapper.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(UserError, match="holds no whole mapper"):
        SpeechMapper.from_pretrained(folder)


def test_features_of_another_width_are_an_error() -> None:
    with pytest.raises(UserError, match=r"mapper\.widths\[0\] is 16, but the encoder's features are 20 wide"):
        SpeechMapper(tiny(), 20, D)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "both"}, "mapper.norm is 'both'; it must be one of pre, post"),
        ({"positions": "learned"}, "mapper.positions is 'learned'"),
        ({"activation": "silu"}, "mapper.activation is 'silu'"),
        ({"widths": [16, 32]}, "mapper.widths has 2 entries"),
        ({"heads": 3}, "mapper.heads is 3, but width 16"),
    ],
)
def test_bad_shapes_are_errors(settings: dict[str, object], message: str) -> None:
    values: dict[str, object] = {"widths": [16, 16, 32], "heads": 2, **settings}
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        MapperConfig(**values)  # type: ignore[arg-type]
