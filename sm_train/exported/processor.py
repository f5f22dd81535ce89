"""Recordings and prompts as a speech LLM takes them: the encoder's input, and token ids around the speech.

Shape letters: S samples.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import BatchFeature, FeatureExtractionMixin, ProcessorMixin

from sm_train.chat import Chat
from sm_train.data import audio
from sm_train.data.inputs import Inputs
from sm_train.errors import UserError
from sm_train.prompts import with_speech

Audio = str | Path | NDArray[Any]
"""A file of audio, or samples [S] or [S, channels] in [-1, 1]."""

_LOUDEST = 16.0
"""Clipped or normalised speech stays well below; integers that were cast to floats do not."""


class SpeechFeatureExtractor(FeatureExtractionMixin):  # type: ignore[misc]
    """Audio to the input of the encoder: ``preprocessor_config.json`` holds every number of it.

    Args:
        inputs: what :meth:`Inputs.to_json` says.
        shortest_samples, longest_samples: of a recording at 16 kHz.
    """

    def __init__(
        self, inputs: dict[str, Any], shortest_samples: int, longest_samples: int | None,
        sampling_rate: int = audio.SAMPLE_RATE_HZ,
        feature_extractor_type: str = "SpeechFeatureExtractor", processor_class: str = "SpeechLlmProcessor",
    ) -> None:  # fmt: skip
        super().__init__(inputs=inputs, sampling_rate=sampling_rate)
        self.shortest_samples, self.longest_samples = shortest_samples, longest_samples
        self.feature_extractor_type, self.processor_class = feature_extractor_type, processor_class
        self._inputs = Inputs.from_json(json.dumps(inputs))

    def __call__(self, recording: Audio, sampling_rate: int | None = None) -> NDArray[np.float32]:
        """One recording as the encoder takes it, unpadded.

        Raises:
            UserError: it cannot be read, has no sampling rate, or is too short or too long.
        """
        named = f"recording {recording}" if isinstance(recording, str | Path) else "the recording"
        if isinstance(recording, str | Path):
            if sampling_rate is not None:
                raise UserError(f"{named} has a rate of its own; leave sampling_rate={sampling_rate} out")
            try:
                samples_S = audio.load(recording)
            except audio.BadAudio as error:
                raise UserError(f"{named}: {error.reason}: {error}") from None
        else:
            samples_S = _samples(np.asarray(recording), sampling_rate)
        audio.require_length(len(samples_S), self.shortest_samples, self.longest_samples, named)
        return self._inputs.prepare(samples_S)

    def to_dict(self) -> dict[str, Any]:
        """What ``preprocessor_config.json`` holds."""
        return {name: value for name, value in super().to_dict().items() if name != "_inputs"}


class SpeechLlmProcessor(ProcessorMixin):  # type: ignore[misc]
    """The feature extractor and the LLM's tokenizer with its chat template; it needs no weights."""

    def __init__(self, feature_extractor: Any, tokenizer: Any, chat_template: Any = None) -> None:
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)

    @property
    def chat(self) -> Chat:
        """The LLM's chat template as token ids."""
        return _chat(self.tokenizer)

    def __call__(self, audio: Sequence[Audio], text: Sequence[str], sampling_rate: int | None = None) -> BatchFeature:
        """Recordings and the prompts about them, one each.

        Args:
            text: a prompt stands behind the speech, unless its ``{speech}`` says where.
            sampling_rate: in Hz, of recordings given as arrays.

        Returns:
            Lists, one entry a pair: ``input_features``, unpadded, and the ids ``prefix_ids`` and ``suffix_ids`` around
            the speech.

        Raises:
            UserError: a recording or a prompt cannot be used.
        """
        halves = [self.chat.halves(with_speech(prompt)) for prompt in text]
        return BatchFeature({
            "input_features": [self.feature_extractor(recording, sampling_rate) for recording in audio],
            "prefix_ids": [prefix for prefix, _ in halves],
            "suffix_ids": [suffix for _, suffix in halves],
        })  # fmt: skip


@functools.lru_cache(maxsize=4)  # not kept by the processor: to print itself it would copy it
def _chat(tokenizer: Any) -> Chat:
    return Chat(tokenizer)


def _samples(given: NDArray[Any], sampling_rate: int | None) -> NDArray[np.float32]:
    """An array of samples as mono at 16 kHz [S]."""
    if not isinstance(sampling_rate, int | np.integer) or sampling_rate < 1:
        raise UserError(f"sampling_rate is {sampling_rate!r}; give that of the samples in Hz, as sampling_rate=16000")
    if given.dtype.kind != "f" or given.ndim not in (1, 2):
        raise UserError(
            f"the recording is an array of {given.dtype} of shape {given.shape}; give samples [S] or [S, channels] as "
            "floats in [-1, 1] (int16 divided by 32768)"
        )
    if not np.isfinite(given).all():
        raise UserError("the recording has samples that are NaN or infinite; give finite ones")
    if given.ndim == 2 and given.shape[1] > given.shape[0]:
        raise UserError(f"the recording is of shape {given.shape}; give [S] or [S, channels], its transpose")
    if given.size and np.abs(given).max() > _LOUDEST:
        raise UserError(
            f"the recording reaches {np.abs(given).max():g}; give floats in [-1, 1] (int16 divided by 32768)"
        )
    samples = given.astype(np.float32)
    return audio.resample(samples[:, None] if samples.ndim == 1 else samples, sampling_rate)
