"""Frozen speech encoders: audio in, pooled hidden states of one layer out.

Shape letters: B utterances, S samples, T frames, E encoder width.
"""

from __future__ import annotations

from bisect import bisect_left
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
from sm_train.data.lengths import FRAMES_PER_POSITION, pooled_frames
from sm_train.errors import UserError
from sm_train.models import checkpoints
from sm_train.models.encoders import base
from sm_train.models.encoders.seamless import SeamlessTrunk
from sm_train.models.encoders.w2v_bert import W2vBertTrunk
from sm_train.models.encoders.wav2vec2 import Wav2Vec2Trunk
from sm_train.models.encoders.whisper import WhisperTrunk

ENCODER_FRAME_RATE_HZ = 50.0
_MOST_SAMPLES = 1 << 24
_OF_NO_WEIGHT = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype")
_FAMILIES: dict[str, Any] = {
    "seamless_m4t_v2": SeamlessTrunk,
    "wav2vec2-bert": W2vBertTrunk,
    "whisper": WhisperTrunk,
    **dict.fromkeys(("wav2vec2", "hubert", "wavlm", "data2vec-audio"), Wav2Vec2Trunk),
}
# How far an utterance alone may be from itself in a padded batch, as a share of the features' scale.
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class EncoderConfig:
    """Which frozen encoder, which layer, how pooled."""

    path: str = config.key(config.REQUIRED, f"folder or hub repository of a checkpoint: {', '.join(_FAMILIES)}")
    revision: str | None = config.key(None, "hub revision to pin; null for a folder")
    layer: int = config.key(
        24, "hidden_states[layer]: 0 is the input of the first layer, the last one is what the encoder returns"
    )
    pool: int = config.key(2, "consecutive frames averaged into one")
    dtype: str = config.key("float32", "precision of the forward pass: float32 | bfloat16 | float16")
    device: str = config.key("auto", "auto | cpu | cuda | cuda:N")
    batching: str = config.key(
        "auto",
        "padded | equal_length (utterances of one length together) | auto: what leaves features as they are alone",
    )

    def __post_init__(self) -> None:
        if self.pool < 1:
            raise ValueError(f"encoder.pool is {self.pool}; it must be 1 or more")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"encoder.dtype is {self.dtype!r}; it must be float32, bfloat16 or float16")
        if self.batching not in ("auto", "padded", "equal_length"):
            raise ValueError(f"encoder.batching is {self.batching!r}; it must be auto, padded or equal_length")


class SpeechEncoder:
    """A speech encoder up to one layer, before any adaptor.

    ``hidden_states[k]`` is the input of layer k; for the last k it is what the encoder returns, its final norm
    included. Layers above are never built, and only the weights in use are read.

    Attributes:
        width: E.
        inputs: what makes :meth:`encode`'s arrays of samples; it can be sent to processes that know no torch.
        weights_hash: the xxh3 of the weights in use.
        settings_hash: of the checkpoint's config and of what makes its inputs.
        shortest_samples: the fewest samples that make one mapper position.
        longest_samples: the most samples that the encoder takes, None for any.
        equal_length: frames would depend on padding, so utterances of different lengths run apart: batches should be
            of one length.
        frame_rate_hz: of pooled frames.

    Raises:
        UserError: the folder is no checkpoint of a known family, lacks weights, or has no such layer.
    """

    def __init__(self, encoder: EncoderConfig) -> None:
        self.layer, self.pool = encoder.layer, encoder.pool
        self.name = f"speech encoder {encoder.path}"
        folder = checkpoints.resolve(encoder.path, encoder.revision, "speech encoder")
        settings = files.read_object(folder / "config.json")
        family = settings.get("model_type")
        if family not in _FAMILIES:
            raise UserError(f"{self.name}: model_type is {family!r}; it must be one of {', '.join(_FAMILIES)}")
        self.device = device_here(encoder.device)
        self.dtype: torch.dtype = getattr(torch, encoder.dtype)
        trunk: base.Trunk = _FAMILIES[family](family, folder, max(encoder.layer, 0), self.name)
        if not 0 <= encoder.layer <= trunk.num_layers:
            raise UserError(f"{self.name} has hidden_states[0] to [{trunk.num_layers}]; layer is {encoder.layer}")
        rate_hz = SAMPLE_RATE_HZ / trunk.samples_per_frame
        if rate_hz != ENCODER_FRAME_RATE_HZ:
            raise UserError(f"{self.name} gives {rate_hz:g} frames a second; only {ENCODER_FRAME_RATE_HZ:g} are known")
        self.weights_hash = tensors_hash(base.read_weights(trunk, folder, self.dtype, self.name))
        said = {name: value for name, value in settings.items() if name not in _OF_NO_WEIGHT}
        self.settings_hash = config.fingerprint({"config": said, "inputs": trunk.inputs.to_json()})
        trunk.model.to(self.device).eval().requires_grad_(False)
        if encoder.layer < trunk.num_layers:
            base.end_behind(trunk.layers)
        self._trunk, self.inputs, self.width = trunk, trunk.inputs, trunk.width
        self.frame_rate_hz = rate_hz / self.pool
        self.longest_samples = trunk.longest_samples
        self.shortest_samples = bisect_left(range(_MOST_SAMPLES), FRAMES_PER_POSITION, key=self.num_frames)
        self.equal_length = {"padded": False, "equal_length": True}.get(encoder.batching, trunk.minds_padding)

    @property
    def facts(self) -> dict[str, Any]:
        """What all parts of a shard set must have in common."""
        return {"encoder_hash": self.weights_hash, "settings_hash": self.settings_hash, "width": self.width}

    def num_frames(self, num_samples: int) -> int:
        """Stored frames of an utterance: the encoder's, pooled."""
        return pooled_frames(self._trunk.num_frames(num_samples), self.pool)

    @torch.inference_mode()
    def encode(self, prepared: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """Features of a batch of utterances: arrays that :attr:`inputs` prepared in, [T, E] each out, pooled."""
        groups: dict[int, list[int]] = {}
        for i, array in enumerate(prepared):
            groups.setdefault(array.size if self.equal_length else 0, []).append(i)
        feats: dict[int, NDArray[np.float32]] = {}
        for group in groups.values():
            feats |= zip(group, self._forward([prepared[i] for i in group]), strict=True)
        return [feats[i] for i in range(len(prepared))]

    def encode_audio(self, audio: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """Features of utterances, each [S] at 16 kHz in, each [T, E] out."""
        return self.encode([self.inputs.prepare(samples_S) for samples_S in audio])

    def _forward(self, prepared: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        try:
            # A GPU's convolutions would take TF32 for float32 by default, and whichever algorithm is fastest.
            with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
                hidden_BTE = checkpoints.first_output(self._trunk.forward(prepared, self.device, self.dtype))
        except base.Reached as reached:
            hidden_BTE = reached.hidden_BTE
        num_frames = [self._trunk.frames_of(array) for array in prepared]
        pooled = [mean_pool(hidden_BTE[i, :n].float(), self.pool) for i, n in enumerate(num_frames)]
        together = torch.cat(pooled).cpu().numpy()  # one transfer
        return np.split(together, np.cumsum([len(p) for p in pooled])[:-1])

    def check_alone_equals_padded(self) -> float:
        """Prove that neighbours leave an utterance's features as they are; to be called before a corpus is encoded.

        Returns:
            The largest difference of a frame, as a share of the frames' scale.

        Raises:
            UserError: it is above 1e-4 (0.02 in float16, 0.1 in bfloat16), or features are not finite.
        """
        rng = np.random.default_rng(0)
        most = self.longest_samples or _MOST_SAMPLES
        lengths = (min(max(self.shortest_samples, 12_345), most), min(max(2 * self.shortest_samples, 40_000), most))
        short_S, long_S = (rng.normal(scale=0.1, size=n).astype(np.float32) for n in lengths)
        (alone_TE,), (together_TE, _) = self.encode_audio([short_S]), self.encode_audio([short_S, long_S])
        if not np.isfinite(alone_TE).all():
            raise UserError(f"{self.name}: features are not finite; set encoder.dtype=float32 or bfloat16")
        scale = np.sqrt((alone_TE**2).sum(axis=1).mean())
        worst = float(np.linalg.norm(alone_TE - together_TE, axis=1).max() / scale)
        if not worst <= _TOLERANCES[self.dtype]:
            raise UserError(
                f"{self.name}: features of an utterance alone and in a padded batch differ by {worst:.1e} of their "
                "scale; set encoder.batching=equal_length"
            )
        return worst


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
