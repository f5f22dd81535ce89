"""The mapper: pooled speech features in, vectors of an LLM's input space out.

Two blocks of Conv1d (kernel 6, stride 2) -> Transformer encoder layers -> Linear, then a head to the LLM's width
(SpeechMapper, arXiv 2601.20417, section 2; 277,031,936 parameters at the paper's size).
Shape letters: B items, T frames, P positions, D width (of a stack, or the LLM's).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sm_train import config, files
from sm_train.data.lengths import num_positions
from sm_train.errors import UserError

PAPER_PARAMETERS = 277_031_936
KERNEL, STRIDE, PADDING = 6, 2, 2


@dataclass(frozen=True)
class MapperConfig:
    """The mapper's shape. The defaults are the paper's size with what trains best on the miniature."""

    widths: list[int] = config.key([1024, 2048, 4096], "widths: encoder, second block, head")
    layers: int = config.key(6, "Transformer layers of each block")
    heads: int = config.key(16, "attention heads")
    feed_forward: int = config.key(2048, "width of the feed-forward layers")
    dropout: float = config.key(0.1, "dropout of attention, feed-forward and residual paths")
    norm: str = config.key("pre", "pre | post (the paper's) layer norm")
    positions: str = config.key("sinusoidal", "sinusoidal (the paper's) | rotary")
    activation: str = config.key("gelu", "gelu | relu (the paper's)")

    def __post_init__(self) -> None:
        for name, allowed in (("norm", NORMS), ("positions", POSITIONS), ("activation", tuple(ACTIVATIONS))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"mapper.{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        for name in ("layers", "heads", "feed_forward"):
            if getattr(self, name) < 1:
                raise ValueError(f"mapper.{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"mapper.dropout is {self.dropout:g}; it must lie in [0, 1)")
        if len(self.widths) != 3:
            raise ValueError(
                f"mapper.widths has {len(self.widths)} entries; it needs three: encoder, second block, head"
            )
        for width in self.widths[:2]:
            if width % (2 * self.heads):
                raise ValueError(f"mapper.heads is {self.heads}, but width {width} is no even multiple of it")


NORMS = ("pre", "post")
POSITIONS = ("rotary", "sinusoidal")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}


class Layer(nn.Module):
    """A Transformer encoder layer, with PyTorch's parameter count and either norm order."""

    def __init__(self, width: int, cfg: MapperConfig) -> None:
        super().__init__()
        self.heads, self.dropout, self.is_pre = cfg.heads, cfg.dropout, cfg.norm == "pre"
        self.is_rotary, self.activation = cfg.positions == "rotary", ACTIVATIONS[cfg.activation]
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, cfg.feed_forward), nn.Linear(cfg.feed_forward, width)
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x_BTD: Tensor, keep_B11T: Tensor, angles_TH: Tensor) -> Tensor:
        """One layer; positions where ``keep`` is false are attended to by none."""
        if self.is_pre:
            x_BTD = x_BTD + self._attend(self.attention_norm(x_BTD), keep_B11T, angles_TH)
            return x_BTD + self._feed_forward(self.feed_forward_norm(x_BTD))
        x_BTD = self.attention_norm(x_BTD + self._attend(x_BTD, keep_B11T, angles_TH))
        out: Tensor = self.feed_forward_norm(x_BTD + self._feed_forward(x_BTD))
        return out

    def _attend(self, x_BTD: Tensor, keep_B11T: Tensor, angles_TH: Tensor) -> Tensor:
        batch, time, width = x_BTD.shape
        q, k, v = self.qkv(x_BTD).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.is_rotary:
            q, k = rotate(q, angles_TH), rotate(k, angles_TH)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=keep_B11T, dropout_p=dropout)
        return self._drop(self.out(mixed.transpose(1, 2).reshape(batch, time, width)))

    def _feed_forward(self, x_BTD: Tensor) -> Tensor:
        return self._drop(self.down(self._drop(self.activation(self.up(x_BTD)))))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """Conv1d that halves the frames, a stack of layers, a linear to the next width."""

    def __init__(self, width: int, next_width: int, cfg: MapperConfig) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, KERNEL, STRIDE, PADDING)
        self.layers = nn.ModuleList(Layer(width, cfg) for _ in range(cfg.layers))
        self.norm = nn.LayerNorm(width) if cfg.norm == "pre" else nn.Identity()
        self.linear = nn.Linear(width, next_width)
        self.is_sinusoidal, self.head_width = cfg.positions == "sinusoidal", width // cfg.heads

    def forward(self, x_BTD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, D] and lengths [B] -> [B, T // 2, next D] and halved lengths."""
        x_BTD = x_BTD.masked_fill(~mask(lengths_B, x_BTD.shape[1]).unsqueeze(-1), 0.0)
        x_BTD = self.conv(x_BTD.transpose(1, 2)).transpose(1, 2)
        lengths_B = lengths_B // STRIDE
        time, width = x_BTD.shape[1:]
        if self.is_sinusoidal:
            angles = position_angles(time, width, x_BTD.device)
            x_BTD = x_BTD + torch.cat([angles.sin(), angles.cos()], dim=-1).to(x_BTD.dtype)
        keep_B11T = mask(lengths_B, time)[:, None, None, :]
        angles_TH = position_angles(time, self.head_width, x_BTD.device)
        for layer in self.layers:
            x_BTD = layer(x_BTD, keep_B11T, angles_TH)
        return self.linear(self.norm(x_BTD)), lengths_B


class SpeechMapper(nn.Module):
    """Features [B, T, E] to positions [B, T // 4, D] in the LLM's input space.

    ``output_rms`` is a constant that the head's output is multiplied by: 1 in the paper, the targets' root mean square
    where targets are far from unit scale.
    """

    def __init__(self, cfg: MapperConfig, input_width: int, output_width: int, output_rms: float = 1.0) -> None:
        super().__init__()
        if input_width != cfg.widths[0]:
            raise UserError(f"mapper.widths[0] is {cfg.widths[0]}, but the encoder's features are {input_width} wide")
        self.cfg, self.output_width, self.output_rms = cfg, output_width, output_rms
        first, second, last = cfg.widths
        self.blocks = nn.ModuleList([Block(first, second, cfg), Block(second, last, cfg)])
        self.hidden, self.head = nn.Linear(last, last), nn.Linear(last, output_width)
        self.activation = ACTIVATIONS[cfg.activation]

    def forward(self, feats_BTE: Tensor, num_frames_B: Tensor) -> Tensor:
        """Mapped positions [B, P, D]; those at or beyond ``num_frames // 4`` mean nothing."""
        x, lengths_B = feats_BTE.to(self.head.weight.dtype), num_frames_B
        for block in self.blocks:
            x, lengths_B = block(x, lengths_B)
        mapped_BPD: Tensor = self.head(self.activation(self.hidden(x))) * self.output_rms
        return mapped_BPD

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.parameters())

    def description(self) -> dict[str, object]:
        """What ``config.json`` holds, enough to build the module again."""
        shape = {"input_width": self.cfg.widths[0], "output_width": self.output_width, "output_rms": self.output_rms}
        return {"model_type": "speech_mapper", "mapper": config.to_mapping(self.cfg), **shape}

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> SpeechMapper:
        """The mapper of a checkpoint folder (``config.json`` + ``mapper.safetensors``), in fp32 on the CPU.

        Raises:
            UserError: the folder is no mapper checkpoint.
        """
        folder = Path(folder)
        saved = files.read_json(folder / "config.json")
        if saved.get("model_type") != "speech_mapper":
            raise UserError(f"{folder} holds no mapper: model_type is {saved.get('model_type')!r}")
        cfg = config.from_mapping(MapperConfig, saved["mapper"], where=str(folder / "config.json"))
        mapper = cls(cfg, saved["input_width"], saved["output_width"], saved["output_rms"])
        try:
            mapper.load_state_dict(load_file(folder / "mapper.safetensors"), strict=True)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UserError(f"{folder} holds no whole mapper: {error}") from None
        return mapper.eval()


def mask(lengths_B: Tensor, time: int) -> Tensor:
    """True at the positions before each length: [B, time]."""
    return torch.arange(time, device=lengths_B.device) < lengths_B[:, None]


def position_angles(time: int, width: int, device: torch.device) -> Tensor:
    """Angles [time, width / 2] of sinusoidal and rotary positions (Vaswani et al. 2017; Su et al. 2021), in fp32."""
    rates = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000.0) / width))
    return torch.arange(time, device=device)[:, None] * rates


def rotate(x_BHTD: Tensor, angles_TH: Tensor) -> Tensor:
    """Turn each pair of halves by its position's angle."""
    sin, cos = angles_TH.sin().to(x_BHTD.dtype), angles_TH.cos().to(x_BHTD.dtype)
    a, b = x_BHTD.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def positions_of(num_frames_B: Tensor) -> Tensor:
    """Mapped positions P of each item [B]."""
    return num_positions(num_frames_B)  # type: ignore[type-var]
