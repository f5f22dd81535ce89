"""Files under a remote prefix: listed and fetched, with transient errors tried again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TypeVar

import pyarrow as pa
from pyarrow import fs

from sm_train.errors import UserError

_ATTEMPTS, _PAUSE_S = 4, 0.25  # the pause doubles
_STREAMS, _RANGE = 8, 1 << 23  # ranges of a file that are fetched side by side, and their bytes

_GOOGLE_S = 10

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
                else fs.FileSystem.from_uri(uri)
                if scheme
                else (fs.LocalFileSystem(), uri)
            )
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{uri} cannot be opened: {_line(error)}") from None
        self._files: fs.FileSystem = found[0]
        self._prefix: str = found[1]

    def read(self, name: str) -> bytes:
        """A small file's bytes."""

        def fetch() -> bytes:
            with self._files.open_input_file(f"{self._prefix}/{name}") as source:
                return bytes(source.read())

        return self._retried(name, fetch)

    def stat(self, names: Sequence[str]) -> dict[str, Stat]:
        """Those of some files that are there."""
        paths = [f"{self._prefix}/{name}" for name in names]
        infos = self._retried(names[0], lambda: self._files.get_file_info(paths))
        return {name: _stat(info) for name, info in zip(names, infos, strict=True) if info.type == fs.FileType.File}

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return self._retried(name, lambda: self.stat([name])[name]).size

    def list(self, base: str) -> dict[str, Stat]:
        """All files below a folder, by name; hidden ones, as unfinished files are, left out."""
        selector = fs.FileSelector(f"{self._prefix}/{base.rstrip('/')}", recursive=True)
        infos = self._retried(base, lambda: self._files.get_file_info(selector))
        found = {info.path.removeprefix(f"{self._prefix}/"): info for info in infos if info.type == fs.FileType.File}
        return {name: _stat(info) for name, info in found.items() if "/." not in name}

    def download(self, name: str, path: Path, size: int) -> None:
        """Fetch a file of a known size to ``path``, in ranges side by side."""

        def fetch() -> None:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.truncate(handle, size)
                with self._files.open_input_file(f"{self._prefix}/{name}") as source:
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

        self._retried(name, fetch)

    def _retried(self, name: str, fetch: Callable[[], T]) -> T:
        reason = ""
        for attempt in range(_ATTEMPTS):
            try:
                return fetch()
            except (FileNotFoundError, KeyError):
                raise UserError(f"{self.uri}/{name} does not exist; the set, or its target set, is not whole") from None
            except (OSError, pa.ArrowException) as error:
                reason = _line(error)
            if attempt + 1 < _ATTEMPTS:
                time.sleep(_PAUSE_S * 2**attempt)
        raise UserError(
            f"{self.uri}/{name} cannot be fetched, {_ATTEMPTS} attempts failed: {reason}; run the same command again "
            "once the storage answers"
        )


def _google(place: str) -> tuple[fs.FileSystem, str]:
    """Arrow's own default tries for a quarter of an hour."""
    return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=_GOOGLE_S)), place


def _stat(info: fs.FileInfo) -> Stat:
    return Stat(int(info.size), int(info.mtime_ns or 0))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
