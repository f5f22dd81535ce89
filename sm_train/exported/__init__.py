"""Exported models: ``SpeechLlm.from_pretrained(FOLDER).generate("question.wav", "Translate this into French.")``.

They are of transformers' own kinds, and importing this lets AutoModel, AutoConfig and AutoProcessor find them.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoProcessor

from sm_train.exported.model import SpeechLlm
from sm_train.exported.processor import SpeechFeatureExtractor, SpeechLlmProcessor
from sm_train.exported.settings import SpeechLlmConfig

__all__ = ["SpeechFeatureExtractor", "SpeechLlm", "SpeechLlmConfig", "SpeechLlmProcessor"]

AutoConfig.register(SpeechLlmConfig.model_type, SpeechLlmConfig, exist_ok=True)
AutoFeatureExtractor.register(SpeechLlmConfig, SpeechFeatureExtractor, exist_ok=True)
AutoModel.register(SpeechLlmConfig, SpeechLlm, exist_ok=True)
AutoProcessor.register(SpeechLlmConfig, SpeechLlmProcessor, exist_ok=True)
