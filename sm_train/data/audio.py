"""Audio files to mono float32 at 16 kHz, or the reason why not. The only place that decodes audio.

Shape letters: S samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from sm_train.records import Utterance

SAMPLE_RATE_HZ = 16_000
TOLERANCE_S = 0.1
"""A file may be this much shorter than the manifest says before it counts as truncated."""
_LONGEST_S = 30 * 24 * 3600
_NOT_OF_LIBSNDFILE = {".m4a", ".mp4", ".aac", ".wma", ".amr", ".webm"}


class BadAudio(Exception):
    """One utterance cannot be used: ``reason`` is a quarantine code, ``str(error)`` the detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself, without decoding it."""

    duration_s: float
    sample_rate_hz: int
    channels: int


def info(path: Path) -> Header:
    """Read the header of a file: how long it is.

    Raises:
        BadAudio: missing_audio, undecodable or empty_audio.
    """
    try:
        if not path.is_file():
            raise BadAudio("missing_audio", f"{path} does not exist")
        with soundfile.SoundFile(path) as file:
            header = Header(file.frames / file.samplerate, file.samplerate, file.channels)
    except (OSError, ValueError) as error:  # a name that no file can have
        raise BadAudio("missing_audio", f"{str(path)!r}: {error}") from None
    except (soundfile.SoundFileError, TypeError) as error:
        detail = f"{path}: {getattr(error, 'error_string', str(error)).strip()}"
        if path.suffix.lower() in _NOT_OF_LIBSNDFILE:
            remedy = f"ffmpeg -i IN{path.suffix} -ac 1 -ar 16000 OUT.flac"
            detail += f" libsndfile reads no {path.suffix}; convert it: {remedy}"
        raise BadAudio("undecodable", detail) from None
    if header.duration_s <= 0:
        raise BadAudio("empty_audio", f"{path} holds no samples")
    if header.duration_s > _LONGEST_S:
        raise BadAudio("undecodable", f"{path}: its header gives no length; convert it to FLAC or WAV")
    return header


def load(path: Path, start_s: float = 0.0, duration_s: float = 0.0) -> NDArray[np.float32]:
    """Read a segment of a file as mono at 16 kHz; ``duration_s`` 0 means up to the end.

    Returns:
        Samples [S] in [-1, 1].

    Raises:
        BadAudio: missing_audio, undecodable, truncated, empty_audio or non_finite.
    """
    try:
        is_file = path.is_file()
    except OSError as error:  # as a name that is too long, or a folder that is closed to us
        raise BadAudio("missing_audio", f"{str(path)[:300]}: {error.strerror}") from None
    if not is_file:
        raise BadAudio("missing_audio", f"{path} does not exist, or is no file")
    if path.suffix.lower() == ".raw":  # taken by its name, and without a rate
        raise BadAudio("undecodable", f"{path}: audio without a header has no sample rate; give WAV or FLAC")
    try:
        with soundfile.SoundFile(path) as file:
            rate_hz = file.samplerate
            first = round(start_s * rate_hz)
            wanted = round(duration_s * rate_hz) if duration_s > 0 else max(file.frames - first, 0)
            if first > file.frames:
                raise BadAudio("truncated", f"{path} ends at {file.frames / rate_hz:.3f} s, before {start_s:.3f} s")
            file.seek(first)
            samples = file.read(wanted, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise BadAudio("undecodable", f"{path}: {getattr(error, 'error_string', str(error)).strip()}") from None
    if len(samples) == 0:
        raise BadAudio("empty_audio", f"{path} holds no samples")
    if len(samples) < wanted - TOLERANCE_S * rate_hz:
        got_s, wanted_s = len(samples) / rate_hz, wanted / rate_hz
        raise BadAudio("truncated", f"{path}: {got_s:.3f} s could be read of {wanted_s:.3f} s")
    if not np.isfinite(samples).all():
        count = int((~np.isfinite(samples)).sum())
        raise BadAudio("non_finite", f"{path}: {count} samples are NaN or infinite")
    mono = samples.mean(axis=1)
    if rate_hz != SAMPLE_RATE_HZ:
        mono = soxr.resample(mono, rate_hz, SAMPLE_RATE_HZ)
    return np.ascontiguousarray(mono, dtype=np.float32)


def _refuse_silence(samples_S: NDArray[np.float32], silence_dbfs: float) -> None:
    peak = float(np.abs(samples_S).max())
    if peak <= 10 ** (silence_dbfs / 20):
        raise BadAudio("silent", f"the loudest sample is {peak:.2e}, at or below silence_dbfs {silence_dbfs:g}")


def load_utterance(
    utterance: Utterance, root: Path | str, max_duration_s: float, silence_dbfs: float
) -> NDArray[np.float32]:
    """The checked samples [S] of a manifest row; relative paths start at ``root``.

    Raises:
        BadAudio: empty_text, too_long, what :func:`load` raises, or silent.
    """
    if not utterance.text.strip():
        raise BadAudio("empty_text", "the manifest gives no text")
    if utterance.duration_s > max_duration_s:
        raise BadAudio("too_long", f"{utterance.duration_s:.2f} s is above max_duration_s {max_duration_s:g}")
    samples_S = load(Path(root) / utterance.audio, utterance.start_s, utterance.duration_s)
    _refuse_silence(samples_S, silence_dbfs)
    return samples_S
