"""Whisper's encoder: every utterance in a window of 30 s, whose silence behind it is dropped again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sm_train.data.inputs import WHISPER, WHISPER_SILENT, Inputs
from sm_train.errors import UserError
from sm_train.models.encoders import base

_STRIDE = 2  # of the second convolution


class WhisperTrunk:
    """The encoder of a checkpoint that has a decoder too. Neighbours and padding make no difference: all are 30 s."""

    prefixes = ("model.encoder.", "encoder.", "")
    minds_padding = False

    def __init__(self, model_type: str, folder: Path, layer: int, what: str) -> None:
        from transformers import WhisperConfig, WhisperFeatureExtractor
        from transformers.audio_utils import window_function
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        extractor = base.read_extractor(WhisperFeatureExtractor, folder, what)
        window_W = window_function(extractor.n_fft, "hann")
        self.longest_samples: int | None = extractor.n_samples
        self.inputs = Inputs(
            WHISPER, extractor.mel_filters, window_W, extractor.n_fft, extractor.hop_length,
            window_samples=extractor.n_samples,
        )  # fmt: skip
        settings = WhisperConfig.from_pretrained(folder)
        self.num_columns: int = extractor.nb_max_frames
        if self.num_columns != _STRIDE * settings.max_source_positions:
            raise UserError(
                f"{what}: its extractor gives {self.num_columns} columns, its encoder takes "
                f"{_STRIDE * settings.max_source_positions}; config.json or preprocessor_config.json is another model's"
            )
        self.samples_per_frame: int = extractor.hop_length * _STRIDE
        self.num_layers, self.width = settings.encoder_layers, settings.d_model
        settings.encoder_layers = min(layer, self.num_layers)
        self.model = base.build(WhisperEncoder, settings)
        self.layers = self.model.layers

    def num_frames(self, num_samples: int) -> int:
        """Those that begin within the utterance."""
        return -(-num_samples // self.samples_per_frame)

    def frames_of(self, prepared: NDArray[np.float32]) -> int:
        columns: int = prepared.shape[1] - WHISPER_SILENT
        return -(-columns // _STRIDE)

    def forward(self, prepared: Sequence[NDArray[np.float32]], device: torch.device, dtype: torch.dtype) -> Any:
        mels_BMT = np.empty((len(prepared), len(prepared[0]), self.num_columns), np.float32)
        for i, mel_MT in enumerate(prepared):
            mels_BMT[i] = mel_MT[:, -1:]
            there = mel_MT[:, : self.num_columns]
            mels_BMT[i, :, : there.shape[1]] = there
        return self.model(torch.from_numpy(mels_BMT).to(device, dtype)).last_hidden_state
