"""Audio files to mono float32 at 16 kHz, or the reason why not. The only place that decodes audio.

Shape letters: S samples.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from sm_train.data.store import Absent
from sm_train.errors import UserError
from sm_train.records import Utterance

if TYPE_CHECKING:
    from sm_train.data.remote import Remote

SAMPLE_RATE_HZ = 16_000
TOLERANCE_S = 0.1
"""A file may be this much shorter than the manifest says before it counts as truncated."""
_LONGEST_S = 30 * 24 * 3600
_NOT_OF_LIBSNDFILE = {".m4a", ".mp4", ".aac", ".wma", ".amr", ".webm"}

OBJECT_LIMIT_BYTES = 1 << 30
"""A larger object of a remote storage is not fetched, as it is decoded from memory."""

_GIVEN_UP_S = 30.0
_given_up: dict[str, tuple[float, str]] = {}  # buckets that did not answer, until when, and what is said of them


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


def _local(path: Path) -> Path:
    try:
        is_file = path.is_file()
    except OSError as error:  # as a name that is too long, or a folder that is closed to us
        raise BadAudio("missing_audio", f"{str(path)[:300]}: {error.strerror}") from None
    if not is_file:
        raise BadAudio("missing_audio", f"{path} does not exist, or is no file")
    if path.suffix.lower() == ".raw":  # taken by its name, and without a rate
        raise BadAudio("undecodable", f"{path}: audio without a header has no sample rate; give WAV or FLAC")
    return path


def load(path: Path | str, start_s: float = 0.0, duration_s: float = 0.0) -> NDArray[np.float32]:
    """Read a segment of a file as mono at 16 kHz; ``duration_s`` 0 means up to the end.

    Args:
        path: a file, or the address of an object (s3://bucket/key), which is fetched into memory.

    Returns:
        Samples [S] in [-1, 1].

    Raises:
        BadAudio: missing_audio, undecodable, truncated, empty_audio or non_finite; too_large for an object.
        UserError: the storage of an address cannot be reached.
    """
    source = BytesIO(_fetch(path)) if isinstance(path, str) and "://" in path else _local(Path(path))
    try:
        with soundfile.SoundFile(source) as file:
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
    mono_S = resample(samples, rate_hz)
    if len(mono_S) == 0:
        raise BadAudio("empty_audio", f"{path}: its {len(samples)} samples at {rate_hz} Hz are none at 16 kHz")
    return mono_S


def resample(samples: NDArray[np.float32], rate_hz: int) -> NDArray[np.float32]:
    """Samples [S, channels] of any rate as mono at 16 kHz [S]."""
    mono_S = samples.mean(axis=1)
    if rate_hz != SAMPLE_RATE_HZ:
        mono_S = soxr.resample(mono_S, rate_hz, SAMPLE_RATE_HZ)
    return np.ascontiguousarray(mono_S, dtype=np.float32)


def require_length(num_samples: int, shortest: int, longest: int | None, what: str) -> None:
    """Raises UserError unless so many samples at 16 kHz lie between an encoder's shortest and longest."""
    duration_s = num_samples / SAMPLE_RATE_HZ
    if num_samples < shortest:
        raise UserError(f"{what} is too short: {duration_s:.2f} s")
    if longest and num_samples > longest:
        longest_s = longest / SAMPLE_RATE_HZ
        raise UserError(f"{what} is too long for its encoder: {duration_s:.2f} s; {longest_s:g} s fit")


@functools.lru_cache(maxsize=1)  # the utterances of a long recording follow each other
def _fetch(address: str) -> bytes:
    scheme, _, rest = address.partition("://")
    bucket, _, name = rest.partition("/")
    uri = f"{scheme}://{bucket}"
    if uri in _given_up and time.monotonic() < _given_up[uri][0]:
        raise UserError(_given_up[uri][1])
    remote = _open_bucket(uri)
    try:
        size = remote.size(name)
        if size > OBJECT_LIMIT_BYTES:
            limit = f"{OBJECT_LIMIT_BYTES >> 20} MB of an object"
            raise BadAudio("too_large", f"{address} has {size >> 20} MB; {limit} can be decoded: cut it into pieces")
        return remote.read(name)
    except Absent:
        remote.require_bucket()
        raise BadAudio("missing_audio", f"{address} does not exist") from None
    except UserError as error:
        _given_up[uri] = time.monotonic() + _GIVEN_UP_S, str(error)
        raise


@functools.cache
def _open_bucket(uri: str) -> Remote:
    from sm_train.data.remote import Remote  # and with it Arrow's file systems

    return Remote(uri)


def place_of(audio: str, root: Path | str) -> Path | str:
    """Where a manifest's audio lies: an address, or a path."""
    if "://" in audio:
        return audio
    if isinstance(root, str) and "://" in root and not audio.startswith("/"):
        return f"{root.rstrip('/')}/{audio}"
    return Path(root) / audio


def _refuse_silence(samples_S: NDArray[np.float32], silence_dbfs: float) -> None:
    peak = float(np.abs(samples_S).max())
    if peak <= 10 ** (silence_dbfs / 20):
        raise BadAudio("silent", f"the loudest sample is {peak:.2e}, at or below silence_dbfs {silence_dbfs:g}")


def load_utterance(
    utterance: Utterance, root: Path | str, max_duration_s: float, silence_dbfs: float
) -> NDArray[np.float32]:
    """The checked samples [S] of a manifest row; relative paths start at ``root``, a folder or an address.

    Raises:
        BadAudio: empty_text, too_long, what :func:`load` raises, or silent.
    """
    if not utterance.text.strip():
        raise BadAudio("empty_text", "the manifest gives no text")
    if utterance.duration_s > max_duration_s:
        raise BadAudio("too_long", f"{utterance.duration_s:.2f} s is above max_duration_s {max_duration_s:g}")
    samples_S = load(place_of(utterance.audio, root), utterance.start_s, utterance.duration_s)
    _refuse_silence(samples_S, silence_dbfs)
    return samples_S
