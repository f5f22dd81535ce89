"""SeamlessM4T-v2's speech encoder, and the filter bank it shares with w2v-BERT 2.0."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sm_train.data.inputs import FILTER_BANK, Inputs
from sm_train.models import checkpoints
from sm_train.models.encoders import base

_FFT_LENGTH, _HOP = 512, 160  # transformers has them in the extractor's code


def filter_bank(folder: Path, what: str) -> Inputs:
    """The inputs that a SeamlessM4T feature extractor gives."""
    from transformers import SeamlessM4TFeatureExtractor

    extractor = base.read_extractor(SeamlessM4TFeatureExtractor, folder, what)
    return Inputs(FILTER_BANK, extractor.mel_filters, extractor.window, _FFT_LENGTH, _HOP, extractor.stride)


class FilterBankTrunk:
    """What SeamlessM4T-v2 and w2v-BERT 2.0 have in common. Padding is masked in attention and in convolutions."""

    longest_samples = None
    minds_padding = False

    def __init__(self, folder: Path, what: str) -> None:
        self.inputs = filter_bank(folder, what)
        self.samples_per_frame = _HOP * self.inputs.stride

    def num_frames(self, num_samples: int) -> int:
        """Windows of 25 ms every 10 ms, in whole pairs."""
        return max(1 + (num_samples - len(self.inputs.window_W)) // _HOP, 0) // self.inputs.stride

    def frames_of(self, prepared: NDArray[np.float32]) -> int:
        return len(prepared)


class SeamlessTrunk(FilterBankTrunk):
    """The conformer and the projection before it; what follows (feed-forward, adaptor, norm) is never built."""

    prefixes = ("speech_encoder.",)

    def __init__(self, model_type: str, folder: Path, layer: int, what: str) -> None:
        from transformers import SeamlessM4Tv2Config
        from transformers.models.seamless_m4t_v2.modeling_seamless_m4t_v2 import SeamlessM4Tv2SpeechEncoder

        super().__init__(folder, what)
        settings = SeamlessM4Tv2Config.from_pretrained(folder)
        self.num_layers, self.width = settings.speech_encoder_layers, settings.hidden_size
        settings.speech_encoder_layers = min(layer, self.num_layers)
        settings.add_adapter = False
        whole = base.build(SeamlessM4Tv2SpeechEncoder, settings)
        self.model = nn.ModuleDict({"feature_projection": whole.feature_projection, "encoder": whole.encoder})
        self.layers = whole.encoder.layers

    def forward(self, prepared: Sequence[NDArray[np.float32]], device: torch.device, dtype: torch.dtype) -> Any:
        feats_BTF, mask_BT = base.padded(prepared)
        hidden_BTE = checkpoints.first_output(self.model["feature_projection"](feats_BTF.to(device, dtype)))
        return self.model["encoder"](hidden_BTE, attention_mask=mask_BT.to(device))
