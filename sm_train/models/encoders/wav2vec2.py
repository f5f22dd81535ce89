"""Encoders of the waveform itself: wav2vec 2.0, HuBERT, WavLM, data2vec."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sm_train.data.inputs import WAVEFORM, Inputs
from sm_train.models.encoders import base


class Wav2Vec2Trunk:
    """Convolutions over samples, a convolution of positions, and Transformer layers.

    Where a group norm goes over time (``feat_extract_norm: group``), or positions come from several convolutions
    (data2vec), a frame depends on the padding behind it, and no mask helps.
    """

    longest_samples = None

    def __init__(self, model_type: str, folder: Path, layer: int, what: str) -> None:
        import transformers

        extractor = base.read_extractor(transformers.Wav2Vec2FeatureExtractor, folder, what)
        self.inputs = Inputs(WAVEFORM, normalise=extractor.do_normalize)
        self.masked: bool = extractor.return_attention_mask
        model_class = {
            "wav2vec2": transformers.Wav2Vec2Model,
            "hubert": transformers.HubertModel,
            "wavlm": transformers.WavLMModel,
            "data2vec-audio": transformers.Data2VecAudioModel,
        }[model_type]
        settings = model_class.config_class.from_pretrained(folder)
        self.minds_padding = model_type == "data2vec-audio" or settings.feat_extract_norm == "group"
        self.convolutions = list(zip(settings.conv_kernel, settings.conv_stride, strict=True))
        self.samples_per_frame = math.prod(settings.conv_stride)
        self.num_layers, self.width = settings.num_hidden_layers, settings.hidden_size
        settings.num_hidden_layers = min(layer, self.num_layers)
        settings.add_adapter = False
        settings.mask_time_prob = settings.mask_feature_prob = 0.0
        self.model = base.build(model_class, settings)
        self.layers = self.model.encoder.layers
        self.prefixes = (f"{model_type.replace('-', '_')}.", "")

    def num_frames(self, num_samples: int) -> int:
        """What the convolutions leave."""
        for kernel, stride in self.convolutions:
            num_samples = max((num_samples - kernel) // stride + 1, 0)
        return num_samples

    def frames_of(self, prepared: NDArray[np.float32]) -> int:
        return self.num_frames(len(prepared))

    def forward(self, prepared: Sequence[NDArray[np.float32]], device: torch.device, dtype: torch.dtype) -> Any:
        samples_BS, mask_BS = base.padded(prepared)
        mask = mask_BS.to(device) if self.masked else None
        return self.model(samples_BS.to(device, dtype), attention_mask=mask).last_hidden_state
