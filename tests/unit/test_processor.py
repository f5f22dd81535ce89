"""The processor: an encoder's input and ids around the speech, from small files alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoProcessor, AutoTokenizer

from sm_train.chat import Chat
from sm_train.data import audio
from sm_train.errors import UserError
from sm_train.exported import SpeechFeatureExtractor, SpeechLlmProcessor
from sm_train.models.speech import EncoderConfig, SpeechEncoder
from tests.exporting import exported, recordings, run  # noqa: F401


@pytest.fixture(scope="module")
def processor(exported: Path) -> SpeechLlmProcessor:  # noqa: F811
    found = AutoProcessor.from_pretrained(exported)
    assert type(found) is SpeechLlmProcessor
    return found


def test_it_prepares_what_the_encoder_prepares(
    processor: SpeechLlmProcessor, encoder_folder: Path, llm_folder: Path, manifest: Path
) -> None:  # fmt: skip
    encoder = SpeechEncoder(EncoderConfig(str(encoder_folder), layer=2, device="cpu"))
    chat = Chat(AutoTokenizer.from_pretrained(llm_folder))
    paths = recordings(manifest)[:2]
    inputs = processor(paths, ["In French.\n{speech}", "What is said?"])
    for path, prepared in zip(paths, inputs["input_features"], strict=True):
        assert np.array_equal(prepared, encoder.inputs.prepare(audio.load(path)))
    wanted = [chat.halves(message) for message in ("In French.\n{speech}", "{speech}\nWhat is said?")]
    assert list(zip(inputs["prefix_ids"], inputs["suffix_ids"], strict=True)) == wanted


def test_it_is_saved_and_printed_as_it_is(processor: SpeechLlmProcessor, tmp_path: Path, manifest: Path) -> None:
    path = recordings(manifest)[0]
    wanted = processor([path], ["Say."])
    assert "SpeechLlmProcessor" in repr(processor)
    processor.save_pretrained(tmp_path)
    found = SpeechLlmProcessor.from_pretrained(tmp_path)([path], ["Say."])
    assert np.array_equal(found["input_features"][0], wanted["input_features"][0])
    assert found["suffix_ids"] == wanted["suffix_ids"]


@pytest.mark.parametrize(
    ("samples", "rate_hz", "line"),
    [
        (np.zeros(16_000, np.int16), 16_000, "array of int16 of shape .*int16 divided by 32768"),
        (np.zeros((2, 2, 2)), 16_000, r"shape \(2, 2, 2\)"),
        (np.full(16_000, np.nan), 16_000, "NaN or infinite"),
        (np.zeros(16_000), 0, "sampling_rate is 0"),
        (np.zeros(400), 16_000, "too short"),
    ],
)
def test_samples_that_are_none_are_named(
    processor: SpeechLlmProcessor, samples: np.ndarray, rate_hz: int, line: str
) -> None:
    with pytest.raises(UserError, match=line):
        processor([samples], ["Say."], sampling_rate=rate_hz)


def test_a_recording_may_be_too_long_for_its_encoder(processor: SpeechLlmProcessor) -> None:
    extractor: SpeechFeatureExtractor = processor.feature_extractor
    short = SpeechFeatureExtractor(extractor.inputs, extractor.shortest_samples, 16_000)
    with pytest.raises(UserError, match="too long for its encoder"):
        short(np.zeros(32_000), 16_000)
