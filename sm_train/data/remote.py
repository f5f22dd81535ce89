"""Files under a remote prefix: listed, fetched and put there, with transient errors tried again.

Every transfer goes through one policy (:meth:`Remote.retried`): the S3 client tries a request twice, we try the whole
operation four times, and begin none later than 25 s after the first, so that a storage that answers nothing costs under
a minute.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TypeVar

import pyarrow as pa
from pyarrow import fs

from sm_train.data.store import Absent
from sm_train.errors import UserError

_ATTEMPTS, _PAUSE_S, _PATIENCE_S = 4, 0.25, 25.0  # the pause doubles
_REQUESTS, _CONNECT_S, _SILENT_S = 2, 5.0, 10.0  # of the S3 client: tries, and seconds without a byte
_STREAMS, _RANGE = 8, 1 << 23  # ranges of a file that are fetched side by side, and their bytes

_GOOGLE_S = 10
_PERMANENT = {
    "NO_SUCH_BUCKET": "the bucket does not exist; make it, or mend the address",
    "ACCESS_DENIED": "access is denied; give credentials that may read and write there (AWS_ACCESS_KEY_ID, a profile)",
    "INVALID_ACCESS_KEY_ID": "the storage does not know these credentials; mend AWS_ACCESS_KEY_ID or the profile",
    "SIGNATURE_DOES_NOT_MATCH": "the storage refuses these credentials; mend AWS_SECRET_ACCESS_KEY or the profile",
    "NO_CREDENTIALS": "there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile",
}

T = TypeVar("T")


class Stat(NamedTuple):
    """What a storage says of a file without reading it."""

    size: int
    mtime_ns: int


class Remote:
    """A folder on a storage: s3://bucket/prefix, gs://bucket/prefix or an absolute path.

    Raises:
        UserError: an address of no known kind of storage; and from every method: a file is not there, or every attempt
            to reach it failed.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        found: tuple[fs.FileSystem, str]
        try:
            scheme, _, place = uri.rpartition("://")
            if scheme and not place.strip("/"):
                raise ValueError("it names no bucket")
            found = (
                _google(place)
                if scheme == "gs"
                else _amazon(uri)
                if scheme == "s3"
                else fs.FileSystem.from_uri(uri)
                if scheme
                else (fs.LocalFileSystem(), uri)
            )
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{uri} cannot be opened: {_line(error)}") from None
        self._files: fs.FileSystem = found[0]
        self._prefix: str = found[1].rstrip("/")

    def path(self, name: str) -> str:
        """BUCKET/KEY of a file, a folder, or of the prefix itself."""
        return f"{self._prefix}/{name}".rstrip("/")

    def read(self, name: str) -> bytes:
        """A small file's bytes."""

        def fetch() -> bytes:
            with self._files.open_input_file(self.path(name)) as source:
                data = bytes(source.read())
                if len(data) != source.size():
                    raise OSError(f"{len(data)} of {source.size()} bytes came")
                return data

        return self.retried(name, fetch)

    def stat(self, names: Sequence[str]) -> dict[str, Stat]:
        """Those of some files that are there."""
        paths = [self.path(name) for name in names]
        infos = self.retried(names[0], lambda: self._files.get_file_info(paths))
        return {name: _stat(info) for name, info in zip(names, infos, strict=True) if info.type == fs.FileType.File}

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return self.retried(name, lambda: self.stat([name])[name]).size

    def exists(self, name: str) -> bool:
        """Whether there is a file, or a folder, of that name."""
        info = self.retried(name, lambda: self._files.get_file_info(self.path(name)))
        return bool(info.type != fs.FileType.NotFound)

    def names(self, base: str) -> list[str]:
        """The files and folders right in a folder, sorted; none where it is absent."""
        selector = fs.FileSelector(self.path(base), allow_not_found=True)
        return sorted(info.base_name for info in self.retried(base, lambda: self._files.get_file_info(selector)))

    def list(self, base: str) -> dict[str, Stat]:
        """All files below a folder, by name; hidden ones, as unfinished files are, left out."""
        selector = fs.FileSelector(self.path(base), recursive=True, allow_not_found=True)
        infos = self.retried(base, lambda: self._files.get_file_info(selector))
        found = {info.path.removeprefix(f"{self._prefix}/"): info for info in infos if info.type == fs.FileType.File}
        return {name: _stat(info) for name, info in found.items() if "/." not in name}

    def download(self, name: str, path: Path, size: int) -> None:
        """Fetch a file of a known size to ``path``, in ranges side by side."""

        def fetch() -> None:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.truncate(handle, size)
                with self._files.open_input_file(self.path(name)) as source:
                    if source.size() != size:
                        raise OSError(f"it has {source.size()} bytes, not {size} as before")

                    def copy(begin: int) -> None:
                        data, wanted = source.read_at(min(_RANGE, size - begin), begin), min(_RANGE, size - begin)
                        if len(data) != wanted or os.pwrite(handle, data, begin) != wanted:
                            raise OSError(f"{len(data)} of {wanted} bytes came, from {begin} on")

                    with ThreadPoolExecutor(_STREAMS) as pool:
                        list(pool.map(copy, range(0, size, _RANGE)))
            finally:
                os.close(handle)

        self.retried(name, fetch)

    def put(self, name: str, data: bytes | Path) -> None:
        """Write a file from bytes or a local file, whole or not at all; large ones in several uploads.

        The S3 client sends a checksum along, which the storage compares; the size is compared here.
        """

        def send() -> None:
            source = pa.py_buffer(data) if isinstance(data, bytes) else _mapped(data)
            out = self._files.open_output_stream(self.path(name))
            out.write(source)  # in one call: a stream that is dropped halfway would be completed as it is
            out.close()
            found = self._files.get_file_info(self.path(name))
            if found.size != source.size:
                raise OSError(f"{found.size or 0} bytes of {source.size} are there")

        self.retried(name, send, "written")

    def delete(self, name: str) -> None:
        """Delete a file; nothing happens where there is none."""

        def remove() -> None:
            with suppress(FileNotFoundError):
                self._files.delete_file(self.path(name))

        self.retried(name, remove, "deleted")

    def require_bucket(self) -> None:
        """Raise a UserError if the bucket itself is absent, which looks like the absence of every file in it."""
        bucket = self._prefix.partition("/")[0]
        info = self.retried("", lambda: self._files.get_file_info(bucket))
        if bucket and info.type == fs.FileType.NotFound:
            raise UserError(f"{self.uri}: {_PERMANENT['NO_SUCH_BUCKET']}")

    def retried(self, name: str, action: Callable[[], T], done: str = "fetched") -> T:
        """What ``action`` returns; it is called again after errors that may pass, and must bear that.

        Raises:
            Absent: a file is not there.
            UserError: it failed every time, or for a reason that does not pass.
        """
        reason, attempt, end = "", 0, time.monotonic() + _PATIENCE_S
        where = f"{self.uri}/{name}".rstrip("/")
        while attempt < _ATTEMPTS and (attempt == 0 or time.monotonic() < end):
            if attempt:
                time.sleep(_PAUSE_S * 2 ** (attempt - 1))
            attempt += 1
            try:
                return action()
            except (FileNotFoundError, KeyError):
                raise Absent(f"{where} does not exist; the set, or its target set, is not whole") from None
            except (OSError, pa.ArrowException) as error:
                reason = _line(error)
            for code, remedy in _PERMANENT.items():
                if f"AWS Error {code}" in reason:
                    raise UserError(f"{where}: {remedy}")
        raise UserError(
            f"{where} cannot be {done}, {attempt} attempts failed: {reason}; run the same command again "
            "once the storage answers"
        )


def _amazon(uri: str) -> tuple[fs.FileSystem, str]:
    """A file system that uploads small files in one request, and gives up a connection that carries nothing.

    An address cannot say that, so the file system is made anew from the options that it would be pickled with.
    """
    found, path = fs.FileSystem.from_uri(uri)
    make, (options,) = found.__reduce__()
    retries = fs.AwsStandardS3RetryStrategy(max_attempts=_REQUESTS)
    timeouts = {"connect_timeout": _CONNECT_S, "request_timeout": _SILENT_S}
    return make({**options, **timeouts, "allow_delayed_open": True, "retry_strategy": retries}), path


def _google(place: str) -> tuple[fs.FileSystem, str]:
    """Arrow's own default tries for a quarter of an hour."""
    return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=_GOOGLE_S)), place


def _mapped(path: Path) -> pa.Buffer:
    return pa.memory_map(str(path)).read_buffer() if path.stat().st_size else pa.py_buffer(b"")


def _stat(info: fs.FileInfo) -> Stat:
    return Stat(int(info.size), int(info.mtime_ns or 0))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
