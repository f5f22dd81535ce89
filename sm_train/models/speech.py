"""Frozen speech encoders: audio in, pooled hidden states of one layer out.

Shape letters: B utterances, S samples, T frames, E encoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from sm_train import config, files
from sm_train.data.audio import SAMPLE_RATE_HZ
from sm_train.data.hashing import tensors_hash
from sm_train.data.lengths import pooled_frames, shortest_samples
from sm_train.errors import UserError
from sm_train.models import checkpoints

_PREFIX = "speech_encoder."
ENCODER_FRAME_RATE_HZ = 50.0


@dataclass(frozen=True)
class EncoderConfig:
    """Which frozen encoder, which layer, how pooled."""

    path: str = config.key(config.REQUIRED, "folder or hub repository of a SeamlessM4T-v2 checkpoint")
    revision: str | None = config.key(None, "hub revision to pin; null for a folder")
    layer: int = config.key(
        24, "hidden_states[layer]: 0 is the input of the first layer, the last one is what the encoder returns"
    )
    pool: int = config.key(2, "consecutive frames averaged into one")
    dtype: str = config.key("float32", "precision of the forward pass: float32 | bfloat16 | float16")
    device: str = config.key("auto", "auto | cpu | cuda | cuda:N")

    def __post_init__(self) -> None:
        if self.pool < 1:
            raise ValueError(f"encoder.pool is {self.pool}; it must be 1 or more")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"encoder.dtype is {self.dtype!r}; it must be float32, bfloat16 or float16")


class _AsIs:
    def prepare(self, samples_S: NDArray[np.float32]) -> NDArray[np.float32]:
        return samples_S

    def to_json(self) -> str | None:
        return None


class SpeechEncoder:
    """SeamlessM4T-v2's speech encoder up to one layer, before its adaptor.

    ``hidden_states[k]`` is the input of layer k; for the last k it is the output of the conformer's final layer norm,
    as in ``SeamlessM4Tv2ConformerEncoder``. Layers above are never built, and only the weights in use are read.

    Raises:
        UserError: the folder is no SeamlessM4T-v2 checkpoint, lacks weights, or has no such layer.
    """

    def __init__(self, encoder: EncoderConfig) -> None:
        from transformers import SeamlessM4TFeatureExtractor, SeamlessM4Tv2Config
        from transformers.models.seamless_m4t_v2.modeling_seamless_m4t_v2 import SeamlessM4Tv2SpeechEncoder

        self.layer, self.pool = encoder.layer, encoder.pool
        self.folder = checkpoints.resolve(encoder.path, encoder.revision, "speech encoder")
        family = files.read_json(self.folder / "config.json").get("model_type")
        if family != "seamless_m4t_v2":
            raise UserError(f"speech encoder {encoder.path}: model_type is {family!r}, not 'seamless_m4t_v2'")
        settings = SeamlessM4Tv2Config.from_pretrained(self.folder)
        num_layers = settings.speech_encoder_layers
        if not 0 <= encoder.layer <= num_layers:
            raise UserError(
                f"speech encoder {encoder.path} has hidden_states[0] to [{num_layers}]; layer is {encoder.layer}"
            )
        self.ends_whole = encoder.layer == num_layers
        settings.speech_encoder_layers = encoder.layer
        settings.add_adapter = False
        self.width: int = settings.hidden_size
        self.equal_length, self.frame_rate_hz = False, ENCODER_FRAME_RATE_HZ / encoder.pool
        self.shortest_samples = shortest_samples(encoder.pool)
        self.inputs = _AsIs()
        self.device = device_here(encoder.device)
        self.dtype = getattr(torch, encoder.dtype)
        with torch.device("meta"):
            model = SeamlessM4Tv2SpeechEncoder(settings)
        self.projection, self.conformer = model.feature_projection, model.encoder
        self.weights_hash = self._load_weights(encoder.path)
        try:
            self.extractor = SeamlessM4TFeatureExtractor.from_pretrained(self.folder)
        except OSError:
            raise UserError(f"speech encoder {encoder.path}: the folder has no preprocessor_config.json") from None

    def _load_weights(self, name: str) -> str:
        modules = {"feature_projection.": self.projection, "encoder.": self.conformer}
        wanted = {_PREFIX + at + key: (module, key) for at, module in modules.items() for key in module.state_dict()}
        found = checkpoints.read_tensors(self.folder, set(wanted), f"speech encoder {name}")
        for at, module in modules.items():
            state = {key: found[_PREFIX + at + key].to(self.dtype) for key in module.state_dict()}
            module.load_state_dict(state, strict=True, assign=True)
            module.to(self.device).eval().requires_grad_(False)
        return tensors_hash(found)

    @torch.inference_mode()
    def encode(self, audio: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """Features of a batch of utterances, each [S] at 16 kHz in, each [T, E] out, T at the pooled frame rate."""
        inputs = self.extractor(list(audio), sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt")
        mask_BT = inputs["attention_mask"].to(self.device)
        feats = self.projection(inputs["input_features"].to(self.device, self.dtype))
        hidden_BTE = self._run_layers(feats[0] if isinstance(feats, tuple) else feats, mask_BT)
        num_frames = mask_BT.sum(dim=1).tolist()
        return [mean_pool(hidden_BTE[i, :n].float(), self.pool).cpu().numpy() for i, n in enumerate(num_frames)]

    def _run_layers(self, hidden_BTE: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        if self.ends_whole:
            return checkpoints.first_output(self.conformer(hidden_BTE, attention_mask=mask_BT))
        if self.layer == 0:
            return hidden_BTE
        # The final layer norm belongs to the last layer's state alone, so a lower layer is caught where it leaves.
        caught: list[torch.Tensor] = []
        last = self.conformer.layers[self.layer - 1]
        handle = last.register_forward_hook(lambda _module, _args, out: caught.append(checkpoints.first_output(out)))
        try:
            self.conformer(hidden_BTE, attention_mask=mask_BT)
        finally:
            handle.remove()
        return caught[0]


def mean_pool(frames_TE: torch.Tensor, pool: int) -> torch.Tensor:
    """Average every ``pool`` frames; a last incomplete group is averaged alone: [T, E] -> [ceil(T / pool), E]."""
    num_frames, width = frames_TE.shape
    whole = num_frames // pool * pool
    pooled = frames_TE[:whole].reshape(-1, pool, width).mean(dim=1)
    if whole < num_frames:
        pooled = torch.cat([pooled, frames_TE[whole:].mean(dim=0, keepdim=True)])
    assert len(pooled) == pooled_frames(num_frames, pool)
    return pooled


def pick_device(name: str) -> str:
    """``auto`` becomes cuda where there is one; another machine's device may be named.

    Raises:
        UserError: there is no device of that name.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise UserError(f"device is {name!r}; it must be auto, cpu, cuda or cuda:N")
    return name


def device_here(name: str) -> torch.device:
    """The device of that name on this machine.

    Raises:
        UserError: torch has none here.
    """
    device = torch.device(pick_device(name))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is {name!r}, but torch sees no GPU here; use auto or cpu")
    return device


class CtcHead:
    """A greedy character CTC decoder on pooled features: the recogniser of the cascade baseline.

    Read from ``ctc_head.safetensors`` (weight [V, E], bias [V]) and ``ctc_vocabulary.json`` (blank first).
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "ctc_head.safetensors"
        if not path.is_file():
            raise UserError(f"cascade: {path} does not exist; set cascade: null to leave the cascade out")
        with safe_open(path, framework="np") as tensors:
            self.weight_VE = tensors.get_tensor("weight").astype(np.float32)
            self.bias_V = tensors.get_tensor("bias").astype(np.float32)
        self.characters: list[Any] = files.read_json(folder / "ctc_vocabulary.json")

    def transcribe(self, feats_TE: NDArray[Any]) -> str:
        """The best path, repeats and blanks removed."""
        best = (feats_TE.astype(np.float32) @ self.weight_VE.T + self.bias_V).argmax(axis=1)
        kept = [int(c) for i, c in enumerate(best) if c != 0 and (i == 0 or c != best[i - 1])]
        return " ".join("".join(self.characters[c] for c in kept).split())
