"""Remote shard sets in a local cache: small files at once, feature shards when first needed, under a limit that holds.

The cache folder lies on a disk of the node and is shared by its ranks and runs: a folder a set, named by a hash of its
address. Nothing in it is trusted: samples are verified at every read, small files at every start. Locks are flocks of
open files, so that a killed process leaves none behind.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from sm_train import files
from sm_train.data.mds import digest, file_digest
from sm_train.data.remote import Remote, Stat
from sm_train.errors import UserError

GB = 10**9
_DATASET = "dataset.json"
_OF_ROOT = ("contract.json", "index.json", "quarantine.parquet", "utterances.parquet")
_RECORD = ".mirror.json"
_ATTEMPTS, _PAUSE_S = 4, 0.25


def locate(shards: str, target: str, cache: str | None, limit_gb: float) -> tuple[Path, Mirror | None]:
    """The folder of a set, and its mirror if it is one: of an address with a scheme, or any path if there is a cache.

    Raises:
        UserError: a remote set without a cache, or one that is not complete or cannot be read.
    """
    if not cache:
        if "://" in shards:
            raise UserError(f"shards is {shards!r}, a remote set; set loader.cache to a folder on a local disk")
        return Path(shards), None
    mirror = Mirror(shards, Path(cache), int(limit_gb * GB))
    mirror.refresh(target)
    return mirror.root, mirror


class Mirror:
    """A remote shard set, and the local folder that stands for it.

    Args:
        uri: s3://bucket/prefix, gs://bucket/prefix or a path.
        cache: the folder of all mirrors of this node.
        limit_bytes: what the feature shards of all mirrors in it may take together.

    Raises:
        UserError: an address of no known kind of storage.
    """

    def __init__(self, uri: str, cache: Path, limit_bytes: int) -> None:
        self.uri = uri.rstrip("/") if "://" in uri else str(Path(uri).absolute())
        self.cache, self.limit_bytes = cache.absolute(), limit_bytes
        self._remote = Remote(self.uri)
        self.root = self.cache / digest(self.uri.encode())
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"loader.cache is {str(cache)!r}, which cannot be a folder: {error.strerror}") from None

    def refresh(self, target: str) -> None:
        """Bring the small files of the set and of one target set up to date; what belongs to another state is removed.

        Raises:
            UserError: the set or the target set is not complete, or cannot be read.
        """
        with _locked(self.cache / f".{self.root.name}.lock"):
            for base in ("", f"targets/{target}/"):
                folder = self.root / base
                dataset = self._remote.read(base + _DATASET)
                known = _record(folder)
                if known.get("dataset") != digest(dataset):
                    shutil.rmtree(folder, ignore_errors=True)
                    known = {}
                remote = self._remote.stat(_OF_ROOT) if not base else self._remote.list(base)
                remote.pop(base + _DATASET, None)
                for name in set(known) - set(remote) - {"uri", "dataset"}:
                    self._local(name).unlink(missing_ok=True)
                kept = {name: self._small(name, info, known.get(name)) for name, info in remote.items()}
                files.write_text(folder / _DATASET, dataset.decode())
                files.write_json(folder / _RECORD, {"uri": self.uri, "dataset": digest(dataset), **kept})

    def _small(self, name: str, stat: Stat, known: list[Any] | None) -> list[Any]:
        """What the record says of a small file, which is fetched unless ``known`` is right: size, time, hash."""
        path = self._local(name)
        if not path.exists() or [*stat, file_digest(path)] != known:
            files.write_whole(path, lambda aside: self._remote.download(name, aside, stat.size))
        return [*stat, file_digest(path)]

    def open(self, name: str, release: Callable[[], None]) -> int:
        """A descriptor of a feature shard, fetched if it is not there; the shard stays until it is closed.

        Args:
            release: gives back what the caller itself holds open, for the case that the cache is full.

        Raises:
            UserError: the shard cannot be fetched, or nothing can make way for it.
        """
        path = self._local(name)
        while True:
            try:
                handle = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                self._fetch(name, path, release)
                continue
            fcntl.flock(handle, fcntl.LOCK_SH)
            if os.fstat(handle).st_nlink:
                os.utime(handle)  # the time of its last use
                return handle
            os.close(handle)  # it left the cache between the two calls

    def discard(self, name: str) -> None:
        """Take a corrupt or stale shard out of the cache: the next ``open`` fetches it."""
        self._local(name).unlink(missing_ok=True)

    def _fetch(self, name: str, path: Path, release: Callable[[], None]) -> None:
        size = self._remote.size(name)
        aside = path.with_name(f"{files.ASIDE}{path.name}")
        handle = self._reserve(name, path, size, release)
        if handle is None:  # another process was at it
            return
        try:
            self._remote.download(name, aside, size)
            with _locked(self.cache / ".lock"):  # who counts what is there must see it under one of its names
                os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)  # ours as long as the lock is held
            raise
        finally:
            os.close(handle)

    def _reserve(self, name: str, path: Path, size: int, release: Callable[[], None]) -> int | None:
        """Room for a file, which stands aside with its final size and locked; None if another process fetches it."""
        aside = path.with_name(f"{files.ASIDE}{path.name}")
        for attempt in range(_ATTEMPTS):
            with _locked(self.cache / ".lock"):
                self._remove_leftovers()
                if path.exists():  # another process was faster
                    return None
                if aside.exists():
                    busy = os.open(aside, os.O_RDONLY)
                elif self._make_room(size):
                    aside.parent.mkdir(parents=True, exist_ok=True)
                    handle = os.open(aside, os.O_RDWR | os.O_CREAT)
                    fcntl.flock(handle, fcntl.LOCK_EX)
                    os.truncate(handle, size)
                    return handle
                else:
                    busy = -1
            if busy >= 0:
                fcntl.flock(busy, fcntl.LOCK_SH)  # until the other one is through, or dead
                os.close(busy)
                return None
            release()
            time.sleep(_PAUSE_S * 2**attempt if attempt else 0)
        raise UserError(
            f"cache {self.cache} is full: {self.uri}/{name} needs {size / GB:.3g} GB, loader.cache_limit_gb is "
            f"{self.limit_bytes / GB:.3g} and what is there is in use; raise it: at least a shard a rank and one more"
        )

    def _make_room(self, size: int) -> bool:
        """Remove the shards that were not used for longest, of any mirror, until ``size`` bytes fit the limit."""
        found = []
        for path in self.cache.glob("*/part-*/*"):
            with suppress(FileNotFoundError):
                found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        excess = sum(used for _, used, _ in found) + size - self.limit_bytes
        if size > self.limit_bytes:
            return False
        for _, used, path in sorted(found):
            if excess > 0 and not path.name.startswith(files.ASIDE) and _remove_unused(path):
                excess -= used
        return excess <= 0

    def _remove_leftovers(self) -> None:
        for aside in self.cache.glob(f"*/part-*/{files.ASIDE}*"):
            _remove_unused(aside)

    def _local(self, name: str) -> Path:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(f"shard set {self.uri}: the path {name!r} leaves the set's folder; do not use this set")
        return self.root / name


def _record(folder: Path) -> dict[str, Any]:
    """What was known of a folder's small files when they were last brought up to date; nothing if that is damaged."""
    try:
        known = files.read_json(folder / _RECORD)
    except UserError:
        return {}
    return known if isinstance(known, dict) else {}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, which stays."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _remove_unused(path: Path) -> bool:
    """Remove a file unless some process holds it open; whether it is gone."""
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
