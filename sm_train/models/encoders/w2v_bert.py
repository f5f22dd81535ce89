"""w2v-BERT 2.0: a conformer on SeamlessM4T's filter bank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sm_train.models.encoders import base
from sm_train.models.encoders.seamless import FilterBankTrunk


class W2vBertTrunk(FilterBankTrunk):
    """The conformer without what a checkpoint may have behind it (feed-forward, adaptor). It has no final norm."""

    prefixes = ("", "wav2vec2_bert.")

    def __init__(self, model_type: str, folder: Path, layer: int, what: str) -> None:
        from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel

        super().__init__(folder, what)
        settings = Wav2Vec2BertConfig.from_pretrained(folder)
        self.num_layers, self.width = settings.num_hidden_layers, settings.hidden_size
        settings.num_hidden_layers = min(layer, self.num_layers)
        settings.add_adapter = settings.use_intermediate_ffn_before_adapter = False
        settings.mask_time_prob = settings.mask_feature_prob = 0.0
        self.model = base.build(Wav2Vec2BertModel, settings)
        self.layers = self.model.encoder.layers

    def forward(self, prepared: Sequence[NDArray[np.float32]], device: torch.device, dtype: torch.dtype) -> Any:
        feats_BTF, mask_BT = base.padded(prepared)
        return self.model(feats_BTF.to(device, dtype), attention_mask=mask_BT.to(device)).last_hidden_state
