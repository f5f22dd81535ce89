"""One utterance's samples to an encoder's input array, in NumPy alone: what the processes that decode audio run.

Every step and dtype is that of transformers' own feature extractors, which loop over frames; here the frames are a
strided view in blocks, so that the numbers are the same bits, 4 to 5 times as soon.

Shape letters: S samples, T input frames, W samples of a window, F frequencies, M mel bands.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

FILTER_BANK, WHISPER, WAVEFORM = "filter_bank", "whisper", "waveform"
WHISPER_SILENT = 3
"""Columns behind an utterance's own in Whisper's input; the last of them is silence, like all that are left out."""

_BLOCK = 64  # frames at a time, whose arrays stay in the processor's cache
_BANDS = 20  # mel bands at a time: few frequencies are heard by any of them


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
        """The encoder's input, unpadded: [T // stride, M * stride], Whisper's [M, T + 3], or the waveform's [S].

        The last of Whisper's columns, repeated, fills up the window; columns beyond the window's length are to be cut.

        Raises:
            ValueError: the utterance is longer than Whisper's window, or shorter than a frame of the filter bank.
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
        values: dict[str, Any] = {}
        for name, value in json.loads(text).items():
            values[name] = np.array(value, np.float64) if isinstance(value, list) else value
        return cls(**values)

    def _filter_bank(self, samples_S: NDArray[np.float32]) -> NDArray[np.float32]:
        mel_MT = np.maximum(1.192092955078125e-07, self._mel(samples_S * 2**15, kaldi=True))
        feats_TM = np.asarray(np.log(mel_MT), np.float32).T
        feats_TM = (feats_TM - feats_TM.mean(0)[None]) / np.sqrt(feats_TM.var(0, ddof=1)[None] + 1e-7)
        whole = len(feats_TM) // self.stride
        return np.ascontiguousarray(feats_TM[: whole * self.stride]).reshape(whole, -1)

    def _whisper(self, samples_S: NDArray[np.float32]) -> NDArray[np.float32]:
        num_samples, whole = len(samples_S), self.window_samples
        if num_samples > whole:
            raise ValueError(f"{num_samples} samples do not fit Whisper's window of {whole}")
        half, columns = len(self.window_W) // 2, whole // self.hop
        padded_S = np.pad(np.pad(samples_S, (0, whole - num_samples)), half, mode="reflect")
        wanted = -(-num_samples // self.hop) + WHISPER_SILENT
        kept = min(wanted, columns)
        mel_MT = np.maximum(1e-10, self._mel(padded_S[: (kept - 1) * self.hop + 2 * half], kaldi=False))
        log_MT = np.asarray(np.log10(mel_MT), np.float32)
        log_MT = (np.maximum(log_MT, log_MT.max() - 8.0) + 4.0) / 4.0
        return np.pad(log_MT, ((0, 0), (0, wanted - kept)), mode="edge")

    def _mel(self, samples_S: NDArray[np.float32], kaldi: bool) -> NDArray[np.float64]:
        """The power in each band, through transformers' complex64; ``kaldi``: no offset, and a pre-emphasis: [M, T]."""
        width = len(self.window_W)
        frames_TW = sliding_window_view(samples_S, width)[:: self.hop]
        mel_MT = np.empty((self.mel_filters_FM.shape[1], len(frames_TW)))
        padded_TN = np.zeros((_BLOCK, self.fft_length))
        for start in range(0, len(frames_TW), _BLOCK):
            framed_TW = frames_TW[start : start + _BLOCK].astype(np.float64)
            count = len(framed_TW)
            if kaldi:
                framed_TW -= framed_TW.mean(axis=1, keepdims=True)
                framed_TW[:, 1:] -= 0.97 * framed_TW[:, :-1]
                framed_TW[:, 0] *= 1 - 0.97
            np.multiply(framed_TW, self.window_W, out=padded_TN[:count, :width])
            spectrum_TF = np.fft.rfft(padded_TN[:count]).astype(np.complex64)
            power_TF = np.abs(spectrum_TF, dtype=np.float64)
            power_TF *= power_TF
            for bands, places, filters_MF in self._bands:  # each sum is over all frequencies: the others add zeros
                mel_MT[bands, start : start + count] = np.dot(filters_MF, power_TF[:, places].T)
        return mel_MT

    @cached_property
    def _bands(self) -> list[tuple[slice, slice, NDArray[np.float64]]]:
        """Neighbouring bands, the frequencies that any of them hears, and their filters there: elsewhere are zeros."""
        groups = []
        for start in range(0, self.mel_filters_FM.shape[1], _BANDS):
            bands = slice(start, start + _BANDS)
            heard = np.flatnonzero(self.mel_filters_FM[:, bands].any(axis=1))
            places = slice(int(heard[0]), int(heard[-1]) + 1)
            groups.append((bands, places, self.mel_filters_FM[places, bands].T))
        return groups
