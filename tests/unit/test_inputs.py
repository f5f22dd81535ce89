from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from sm_train.data.inputs import FILTER_BANK, WAVEFORM, WHISPER, WHISPER_SILENT, Inputs
from tests import builders
from tests.builders import ROOT

RATE_HZ = 16_000


def tones(duration_s: float) -> np.ndarray:
    return builders.tones(np.random.default_rng(11), duration_s)


def seamless_extractor() -> object:
    from transformers import SeamlessM4TFeatureExtractor

    return SeamlessM4TFeatureExtractor()


def filter_bank() -> Inputs:
    extractor = seamless_extractor()
    return Inputs(FILTER_BANK, extractor.mel_filters, extractor.window, fft_length=512, hop=160, stride=2)


def whisper(seconds: int = 2) -> tuple[object, Inputs]:
    from transformers import WhisperFeatureExtractor
    from transformers.audio_utils import window_function

    extractor = WhisperFeatureExtractor(chunk_length=seconds)
    window_W = window_function(400, "hann")
    return extractor, Inputs(WHISPER, extractor.mel_filters, window_W, 400, 160, window_samples=seconds * RATE_HZ)


LENGTHS = [560, 719, 720, 721, 880, *range(1000, 12_000, 487), 20_559, 20_560, 100_000, 333_333]


@pytest.mark.parametrize("num_samples", LENGTHS)
def test_the_filter_bank_is_that_of_transformers_bit_for_bit(num_samples: int) -> None:
    """Speech-like, noise, with a silent stretch, and soft: of every length about the blocks' edges."""
    rng = np.random.default_rng(num_samples)
    extractor, ours = seamless_extractor(), filter_bank()
    tones_S = builders.tones(rng, num_samples / RATE_HZ)
    noise_S = rng.normal(size=num_samples).astype(np.float32)
    holed_S = noise_S.copy()
    holed_S[num_samples // 3 : num_samples // 2] = 0
    for samples_S in (tones_S, noise_S, holed_S, tones_S * np.float32(1e-4)):
        theirs = extractor(samples_S, sampling_rate=RATE_HZ, return_tensors="np")
        expected_TF = theirs["input_features"][0][theirs["attention_mask"][0] == 1]
        got_TF = ours.prepare(samples_S)
        assert got_TF.dtype == np.float32
        assert got_TF.flags.c_contiguous
        np.testing.assert_array_equal(got_TF, expected_TF)


@pytest.mark.parametrize(
    "num_samples", [1, 159, 160, 161, 199, 201, 6000, 15_999, 31_400, 31_679, 31_799, 31_801, 32_000]
)
def test_whispers_input_is_transformers_window_without_its_silence(num_samples: int) -> None:
    extractor, ours = whisper()
    samples_S = tones(num_samples / RATE_HZ)
    window_S = np.zeros(32_000, np.float32)
    window_S[:num_samples] = samples_S
    (expected_MT,) = extractor._np_extract_fbank_features(window_S[None], "cpu")
    got_MT = ours.prepare(samples_S)
    assert got_MT.shape[1] == -(-num_samples // 160) + WHISPER_SILENT
    whole_MT = np.concatenate([got_MT, np.repeat(got_MT[:, -1:], 200, axis=1)], axis=1)[:, :200]
    np.testing.assert_array_equal(whole_MT, expected_MT)
    in_torch_MT = extractor(samples_S, sampling_rate=RATE_HZ, return_tensors="np")["input_features"][0]
    np.testing.assert_allclose(whole_MT, in_torch_MT, atol=1e-4)


def test_more_than_whispers_window_is_refused() -> None:
    with pytest.raises(ValueError, match="32001 samples do not fit Whisper's window of 32000"):
        whisper()[1].prepare(np.zeros(32_001, np.float32))


@pytest.mark.parametrize("normalise", [True, False])
def test_a_waveform_is_normalised_where_the_extractor_says_so(normalise: bool) -> None:
    from transformers import Wav2Vec2FeatureExtractor

    extractor = Wav2Vec2FeatureExtractor(do_normalize=normalise)
    samples_S = tones(0.7) + np.float32(0.2)
    expected_S = extractor(samples_S, sampling_rate=RATE_HZ, return_tensors="np")["input_values"][0]
    got_S = Inputs(WAVEFORM, normalise=normalise).prepare(samples_S)
    assert got_S.dtype == np.float32
    np.testing.assert_array_equal(got_S, expected_S)
    assert abs(float(got_S.mean())) < 1e-3 or not normalise


@pytest.mark.parametrize("kind", [FILTER_BANK, WHISPER, WAVEFORM])
def test_text_brings_everything_back_exactly(kind: str) -> None:
    inputs = {FILTER_BANK: filter_bank(), WHISPER: whisper()[1], WAVEFORM: Inputs(WAVEFORM, normalise=False)}[kind]
    again = Inputs.from_json(inputs.to_json())
    np.testing.assert_array_equal(again.mel_filters_FM, inputs.mel_filters_FM)
    np.testing.assert_array_equal(again.window_W, inputs.window_W)
    assert again.to_json() == inputs.to_json()
    samples_S = tones(1.3)
    np.testing.assert_array_equal(again.prepare(samples_S), inputs.prepare(samples_S))


def test_a_process_that_prepares_loads_neither_torch_nor_transformers() -> None:
    script = "import sys, sm_train.data.inputs; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
