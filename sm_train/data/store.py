"""Where a shard set lies: a folder, or a prefix of an object store. What is written there is whole or absent.

Names are relative to the set, with slashes. Nothing above this file knows which of the two it is: ``at`` opens a
:class:`Folder` here, or a :class:`sm_train.data.bucket.Bucket`.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from sm_train import files
from sm_train.errors import UserError

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # what a file system without hard links says


class Absent(UserError):
    """A file is not there, though its storage answers."""


class Store(Protocol):
    """A place for a set's files."""

    uri: str

    def read(self, name: str) -> bytes:
        """A small file's bytes.

        Raises:
            Absent: it is not there.
            UserError: it cannot be had.
        """

    def exists(self, name: str) -> bool:
        """Whether there is a file, or a folder, of that name."""

    def names(self, folder: str = "") -> list[str]:
        """The files and folders right in the set, or in a folder of it, sorted; hidden ones are left out."""

    def write(self, name: str, data: bytes | Path) -> None:
        """Write a file from bytes or a local file, whole or not at all; one that is there gives way."""

    def write_new(self, name: str, data: bytes) -> bool:
        """Write a file unless there is one of that name; whether it was written. Of two writers at once, one wins."""

    def scratch(self, name: str) -> Path:
        """An absent local path for an unfinished folder, on the disk of the store if it has one."""

    def publish(self, aside: Path, name: str, marker: str) -> None:
        """Let a finished local folder become ``name``; ``marker`` is the file in it that makes it whole.

        If a whole one is there, another writer was first: it stays. ``aside`` is gone afterwards.
        """

    def remove(self, name: str, marker: str = "") -> None:
        """Remove a file or a folder, its marker first; nothing happens where there is none."""

    def sweep(self) -> None:
        """Remove what killed writers left unfinished; call it only where no writer is at work."""


Place = Path | Store


def at(place: Path | str | Store) -> Store:
    """The store of a path, of an address with a scheme, or the one given.

    Raises:
        UserError: an address of no known kind of storage.
    """
    if isinstance(place, Path):
        return Folder(place)
    if not isinstance(place, str):
        return place
    scheme, separator, rest = place.partition("://")
    if not separator:
        return Folder(Path(place))
    if scheme == "file":
        raise UserError(f"{place}: a set in a folder is named by its path, as {rest}")
    if scheme not in ("s3", "gs"):
        raise UserError(f"{place}: sets are written to a folder, to s3://bucket/prefix or to gs://bucket/prefix")
    from sm_train.data.bucket import Bucket  # and with it Arrow's file systems

    return Bucket(place)


def absolute(place: str) -> str:
    """A path, of a set or a manifest, for processes with another working folder; an address stays as it is."""
    return place if "://" in place else str(Path(place).resolve())


class Folder:
    """A folder of a POSIX file system: what is unfinished has a hidden name, and is renamed."""

    def __init__(self, root: Path) -> None:
        self.root, self.uri = root, str(root)

    def read(self, name: str) -> bytes:
        """A small file's bytes."""
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            raise Absent(f"file {self.root / name} does not exist") from None

    def exists(self, name: str) -> bool:
        """Whether there is a file, or a folder, of that name."""
        return (self.root / name).exists()

    def names(self, folder: str = "") -> list[str]:
        """The files and folders right in the set, or in a folder of it, sorted; hidden ones are left out."""
        path = self.root / folder
        found: Sequence[str] = os.listdir(path) if path.is_dir() else ()
        return sorted(name for name in found if not name.startswith("."))

    def write(self, name: str, data: bytes | Path) -> None:
        """Write a file, whole or not at all."""

        def fill(aside: Path) -> None:
            shutil.copyfile(data, aside) if isinstance(data, Path) else aside.write_bytes(data)

        files.write_whole(self.root / name, fill)

    def write_new(self, name: str, data: bytes) -> bool:
        """Write a file unless there is one: a finished one is linked to its name, which only one writer can do.

        Where the file system has no hard links, the name itself is taken first, and then filled: still of two writers
        one wins, but a reader may meet half a file, and a writer that is killed then leaves one.
        """
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{files.ASIDE}{path.name}-{socket.gethostname()}-{os.getpid()}")
        try:
            aside.write_bytes(data)
            files.sync(aside)
            os.link(aside, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if not _fill_new(path, data):
                return False
        finally:
            aside.unlink(missing_ok=True)
        files.sync(path.parent)
        return True

    def scratch(self, name: str) -> Path:
        """A hidden name in the folder itself, of this process alone."""
        aside = self.root / f"{files.ASIDE}{name}-{socket.gethostname()}-{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        return aside

    def publish(self, aside: Path, name: str, marker: str) -> None:
        """Sync every file of the folder, then rename it."""
        files.publish_folder(aside, self.root / name, marker)

    def remove(self, name: str, marker: str = "") -> None:
        """Remove a file; or a folder, which is renamed first, so that it is gone whole."""
        path = self.root / name
        if not path.is_dir():
            path.unlink(missing_ok=True)
            if path.parent.is_dir():
                files.sync(path.parent)  # what is written next must not come back beside it
            return
        aside = self.scratch(f"removed-{name.replace('/', '-')}")
        os.rename(path, aside)
        shutil.rmtree(aside)

    def sweep(self) -> None:
        """Remove every hidden unfinished file and folder."""
        for path in self.root.glob(f"{files.ASIDE}*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _fill_new(path: Path, data: bytes) -> bool:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


class Guarded:
    """Another store, which is written to only after ``check()``, which raises where that must not be."""

    def __init__(self, place: Store, check: Callable[[], None]) -> None:
        self._place, self._check, self.uri = place, check, place.uri

    def read(self, name: str) -> bytes:
        """A small file's bytes."""
        return self._place.read(name)

    def exists(self, name: str) -> bool:
        """Whether there is a file, or a folder, of that name."""
        return self._place.exists(name)

    def names(self, folder: str = "") -> list[str]:
        """The files and folders right in the set, or in a folder of it."""
        return self._place.names(folder)

    def write(self, name: str, data: bytes | Path) -> None:
        """Write a file."""
        self._check()
        self._place.write(name, data)

    def write_new(self, name: str, data: bytes) -> bool:
        """Write a file unless there is one of that name."""
        self._check()
        return self._place.write_new(name, data)

    def scratch(self, name: str) -> Path:
        """An absent local path for an unfinished folder."""
        return self._place.scratch(name)

    def publish(self, aside: Path, name: str, marker: str) -> None:
        """Let a finished local folder become ``name``."""
        self._check()
        self._place.publish(aside, name, marker)

    def remove(self, name: str, marker: str = "") -> None:
        """Remove a file or a folder."""
        self._check()
        self._place.remove(name, marker)

    def sweep(self) -> None:
        """Remove what killed writers left unfinished."""
        self._check()
        self._place.sweep()
