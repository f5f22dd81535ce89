"""Speech of the miniature world: espeak-ng in-process, one fresh library per utterance.

The synthesiser carries state from one utterance to the next, which neither its seed nor a new start resets. Loading the
library anew for every utterance does, so the samples depend on the arguments alone. The library is not thread-safe.
"""

from __future__ import annotations

import _ctypes
import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Samples = NDArray[np.int16]
SAMPLE_RATE_HZ = 16_000
MIN_RATE_WPM, MAX_RATE_WPM = 135, 185
PITCH_SPREAD = 8
PEAKS = (0.3, 0.9)

_SYNCHRONOUS = 2
_RATE, _PITCH = 1, 3
_CHARACTERS, _UTF8 = 1, 1
_SYNTH_ARGUMENTS: list[Any] = [
    *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int),
    *(ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p),
]
_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@dataclass(frozen=True, slots=True)
class Voice:
    """A speaker: an espeak voice with a variant ("en-us+f3") and the middle of its pitch, 0 to 99."""

    espeak: str
    pitch: int

    @property
    def name(self) -> str:
        return self.espeak


TRAIN_VOICES = (
    Voice("en-us", 45),
    Voice("en-us+f2", 55),
    Voice("en-us+f4", 62),
    Voice("en-us+m1", 40),
    Voice("en-us+m3", 32),
    Voice("en-us+m7", 48),
    Voice("en", 42),
    Voice("en+f3", 58),
    Voice("en+m2", 36),
    Voice("en-gb-x-rp+f1", 52),
    Voice("en-gb-x-rp+m4", 38),
    Voice("en-gb-scotland+m1", 45),
)
HELD_OUT_VOICES = (Voice("en-us+f5", 50), Voice("en+m5", 42), Voice("en-gb-scotland+f2", 56))


class SpeechError(RuntimeError):
    """espeak-ng refused: an unknown voice, or its data could not be found."""


def synthesise(text: str, voice: Voice, rate_wpm: int, pitch: int) -> Floats:
    """Speak ``text``: float32 [S] at 16 kHz, as loud as espeak makes it. Equal arguments give equal samples.

    Raises:
        SpeechError: espeak-ng knows no such voice, or made no sound.
    """
    import soxr

    samples, rate_hz = _speak(text, voice.espeak, rate_wpm, pitch)
    if not samples.size:
        raise SpeechError(f"espeak-ng made no sound of {text!r}")
    audio: Floats = soxr.resample(samples.astype(np.float32) / 32768.0, rate_hz, SAMPLE_RATE_HZ)
    return audio


def utter(text: str, voice: Voice, rng: np.random.Generator, noise_snr_db: float | None = None) -> Floats:
    """One recording of ``text``: rate, pitch and loudness drawn from ``rng``, with white noise at an SNR if wanted.

    Returns float32 [S] at 16 kHz whose peak is drawn from :data:`PEAKS`.
    """
    rate_wpm = int(rng.integers(MIN_RATE_WPM, MAX_RATE_WPM + 1))
    pitch = voice.pitch + int(rng.integers(-PITCH_SPREAD, PITCH_SPREAD + 1))
    peak = float(rng.uniform(*PEAKS))
    audio = synthesise(text, voice, rate_wpm, pitch)
    if noise_snr_db is not None:
        noise_rms = float(np.sqrt(np.mean(audio.astype(np.float64) ** 2))) * 10 ** (-noise_snr_db / 20)
        audio += np.float32(noise_rms) * rng.standard_normal(audio.size, dtype=np.float32)
    audio *= np.float32(peak / float(np.abs(audio).max()))
    return audio


def _speak(text: str, voice_name: str, rate_wpm: int, pitch: int) -> tuple[Samples, int]:
    """int16 [S] and its sample rate, from a library loaded for this call alone."""
    import espeakng_loader

    chunks: list[Samples] = []

    def collect(wave: Any, count: int, _events: Any) -> int:
        if wave and count > 0:
            chunks.append(np.ctypeslib.as_array(wave, shape=(count,)).copy())
        return 0

    callback = _Callback(collect)
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    try:
        rate_hz = library.espeak_Initialize(_SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 0)
        if rate_hz <= 0:
            raise SpeechError(f"espeak-ng cannot start from {espeakng_loader.get_data_path()}")
        if library.espeak_SetVoiceByName(voice_name.encode()) != 0:
            raise SpeechError(f"espeak-ng knows no voice {voice_name!r}")
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # it seeds itself with the time of day
        library.espeak_SetSynthCallback(callback)
        library.espeak_SetParameter(_RATE, rate_wpm, 0)
        library.espeak_SetParameter(_PITCH, pitch, 0)
        library.espeak_Synth.argtypes = _SYNTH_ARGUMENTS
        data = text.encode()
        status = library.espeak_Synth(data, len(data) + 1, 0, _CHARACTERS, 0, _UTF8, None, None)
        library.espeak_Synchronize()
        library.espeak_Terminate()
        if status != 0:
            raise SpeechError(f"espeak-ng failed with status {status} on {text!r}")
    finally:
        _ctypes.dlclose(library._handle)
    return np.concatenate(chunks) if chunks else np.zeros(0, np.int16), rate_hz
