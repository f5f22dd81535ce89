"""One utterance's samples to an encoder's input array, in NumPy alone: what the processes that decode audio run.

Every step and dtype is that of transformers' own feature extractors, whose loop over frames holds the GIL; here the
frames are one strided view, so that the numbers are the same bits, sooner, and threads can share the work.

Shape letters: S samples, T input frames, W samples of a window, F frequencies, M mel bands.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

FILTER_BANK, WHISPER, WAVEFORM = "filter_bank", "whisper", "waveform"

_BLOCK = 256  # frames at a time: their buffer and spectrum stay in the processor's cache


def _none() -> NDArray[np.float64]:
    return np.zeros(0)


@dataclass(frozen=True, eq=False)
class Inputs:
    """What turns an utterance's samples at 16 kHz into the input of an encoder, for that utterance alone.

    ``filter_bank`` (SeamlessM4T, w2v-BERT 2.0): log-mel bands as Kaldi has them, each normalised over the utterance,
    ``stride`` frames side by side. ``whisper``: log-mel bands of a window of ``window_samples``, whose length the
    utterance must not exceed. ``waveform`` (wav2vec 2.0, HuBERT): the samples, normalised if ``normalise``.
    """

    kind: str
    mel_filters_FM: NDArray[np.float64] = field(default_factory=_none)
    window_W: NDArray[np.float64] = field(default_factory=_none)
    fft_length: int = 0
    hop: int = 0
    stride: int = 1
    window_samples: int = 0
    normalise: bool = True

    def prepare(self, samples_S: NDArray[np.float32]) -> NDArray[np.float32]:
        """The encoder's input, unpadded: [T // stride, M * stride], Whisper's [M, T], or the waveform's [S].

        Whisper's ends with one column of silence, where there is any, to be repeated up to the window's length.

        Raises:
            ValueError: the utterance is longer than Whisper's window.
        """
        if self.kind == FILTER_BANK:
            return self._filter_bank(samples_S)
        if self.kind == WHISPER:
            return self._whisper(samples_S)
        if not self.normalise:
            return samples_S
        return (samples_S - samples_S.mean()) / np.sqrt(samples_S.var() + 1e-7)  # type: ignore[no-any-return]

    def to_json(self) -> str:
        """Everything, exactly, as text."""
        return json.dumps({k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in asdict(self).items()})

    @classmethod
    def from_json(cls, text: str) -> Inputs:
        """The inverse of :meth:`to_json`."""
        values: dict[str, Any] = json.loads(text)
        return cls(**{k: np.array(v, np.float64) if isinstance(v, list) else v for k, v in values.items()})

    def _filter_bank(self, samples_S: NDArray[np.float32]) -> NDArray[np.float32]:
        power_TF = self._power(samples_S * 2**15, kaldi=True)
        mel_MT = np.maximum(1.192092955078125e-07, np.dot(self.mel_filters_FM.T, power_TF.T))
        feats_TM = np.asarray(np.log(mel_MT), np.float32).T
        feats_TM = (feats_TM - feats_TM.mean(0)[None]) / np.sqrt(feats_TM.var(0, ddof=1)[None] + 1e-7)
        whole = len(feats_TM) // self.stride
        return np.ascontiguousarray(feats_TM[: whole * self.stride]).reshape(whole, -1)

    def _whisper(self, samples_S: NDArray[np.float32]) -> NDArray[np.float32]:
        if len(samples_S) > self.window_samples:
            raise ValueError(f"{len(samples_S)} samples do not fit Whisper's window of {self.window_samples}")
        half = len(self.window_W) // 2
        padded_S = np.zeros(self.window_samples, np.float32)
        padded_S[: len(samples_S)] = samples_S
        padded_S = np.pad(padded_S, half, mode="reflect")
        num_frames = 1 + self.window_samples // self.hop
        touched = min(num_frames, (half + len(samples_S)) // self.hop + 1)
        if len(samples_S) + half >= self.window_samples:  # the end is reflected too
            touched = num_frames
        # The product is of the whole window, as its last bits depend on its shape; frames of silence are zeros.
        power_TF = np.zeros((num_frames, len(self.mel_filters_FM)))
        power_TF[:touched] = self._power(padded_S[: (touched - 1) * self.hop + 2 * half], kaldi=False)
        mel_MT = np.maximum(1e-10, np.dot(self.mel_filters_FM.T, power_TF.T))
        log_MT = np.asarray(np.log10(mel_MT), np.float32)[:, :-1]
        log_MT = (np.maximum(log_MT, log_MT.max() - 8.0) + 4.0) / 4.0
        return np.ascontiguousarray(log_MT[:, : touched + 1])

    def _power(self, samples_S: NDArray[np.float32], kaldi: bool) -> NDArray[np.float64]:
        """The power spectrum [T, F], through transformers' complex64; ``kaldi``: no offset, and a pre-emphasis."""
        frames_TW = sliding_window_view(samples_S, len(self.window_W))[:: self.hop]
        power_TF = np.empty((len(frames_TW), len(self.mel_filters_FM)))
        for start in range(0, len(frames_TW), _BLOCK):
            rows = slice(start, start + _BLOCK)
            framed_TW = frames_TW[rows].astype(np.float64)
            if kaldi:
                framed_TW -= framed_TW.mean(axis=1, keepdims=True)
                framed_TW[:, 1:] -= 0.97 * framed_TW[:, :-1]
                framed_TW[:, 0] *= 1 - 0.97
            framed_TW *= self.window_W
            spectrum_TF = np.fft.rfft(framed_TW, self.fft_length).astype(np.complex64)
            power_TF[rows] = np.abs(spectrum_TF, dtype=np.float64) ** 2.0
        return power_TF
