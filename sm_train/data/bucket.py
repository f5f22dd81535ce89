"""A set under a prefix of an object store: s3://bucket/prefix, or gs://bucket/prefix.

There is no rename there, and a file is seen only once it is whole. So a part is uploaded file by file, its marker last;
what has no marker is nothing, and is written over. On S3 ``write_new`` is a conditional put, of which one of two wins.
Where there is none (gs://, an S3 that answers 501) the promise is weaker: the writer looks, writes, waits and reads
back, so that of two the later one wins as long as neither stands still for longer than that between look and write.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sm_train.data import processes, s3
from sm_train.data.mds import digest
from sm_train.data.remote import Remote
from sm_train.errors import UserError

_UPLOADS = 4  # files of a part at once; each goes up in several streams
_SETTLE_S = 2.0
_SCRATCH = "sm_train-scratch"


class Bucket:
    """A prefix of a bucket.

    Raises:
        UserError: an address that names no bucket, or carries settings; and from every method: the storage cannot be
            reached, or refuses.
    """

    def __init__(self, uri: str) -> None:
        if "?" in uri or "@" in uri:
            raise UserError(
                f"{uri}: settings of a storage come from the environment (AWS_ENDPOINT_URL), not an address"
            )
        self.uri = uri.rstrip("/")
        self._remote = Remote(self.uri)
        self._is_s3 = uri.startswith("s3://")
        self._scratch = Path(tempfile.gettempdir()) / f"{_SCRATCH}-{os.getuid()}" / digest(self.uri.encode())

    def read(self, name: str) -> bytes:
        """A small file's bytes."""
        return self._remote.read(name)

    def exists(self, name: str) -> bool:
        """Whether there is a file, or a folder, of that name."""
        return self._remote.exists(name)

    def names(self, folder: str = "") -> list[str]:
        """The files and folders right in the set, or in a folder of it, sorted; hidden ones are left out."""
        return [name for name in self._remote.names(folder) if not name.startswith(".")]

    def write(self, name: str, data: bytes | Path) -> None:
        """Write a file: a reader sees the old one or the new one."""
        self._remote.put(name, data)

    def write_new(self, name: str, data: bytes) -> bool:
        """Write a file unless there is one; whether it was written."""
        if self._is_s3:
            try:
                return self._put_new(name, data)
            except s3.NotSupported:
                pass
        if self.exists(name):
            return False
        self.write(name, data)
        time.sleep(_SETTLE_S)
        return self.read(name) == data

    def _put_new(self, name: str, data: bytes) -> bool:
        attempts = 0

        def put() -> bool:
            nonlocal attempts
            attempts += 1
            return s3.put_new(self._remote.path(name), data) or (attempts > 1 and self.read(name) == data)

        return self._remote.retried(name, put, "written")

    def scratch(self, name: str) -> Path:
        """A local temporary path of this process alone; what dead processes of this machine left goes."""
        self._sweep_scratch()
        aside = self._scratch / f"{processes.own()}-{name}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(parents=True, exist_ok=True)
        return aside

    def publish(self, aside: Path, name: str, marker: str) -> None:
        """Upload a folder's files, several at once, and its marker last; files that it does not have go."""
        if not self.exists(f"{name}/{marker}"):
            files = sorted(path.relative_to(aside).as_posix() for path in aside.rglob("*") if path.is_file())
            _side_by_side(self._delete, [f for f in self._files_of(name) if f.removeprefix(f"{name}/") not in files])
            _side_by_side(lambda f: self._remote.put(f"{name}/{f}", aside / f), [f for f in files if f != marker])
            self._remote.put(f"{name}/{marker}", aside / marker)
        shutil.rmtree(aside, ignore_errors=True)

    def remove(self, name: str, marker: str = "") -> None:
        """Remove a file, or a folder's files in the order of their names, but its marker first."""
        files = self._files_of(name)
        if f"{name}/{marker}" in files:
            self._delete(f"{name}/{marker}")
            files.remove(f"{name}/{marker}")
        for file in files or [name]:
            self._delete(file)

    def sweep(self) -> None:
        """Remove what processes of this machine that are gone left in its temporary folder."""
        self._sweep_scratch()

    def _files_of(self, folder: str) -> list[str]:
        return sorted(self._remote.list(folder))

    def _delete(self, name: str) -> None:
        if self._is_s3:
            self._remote.retried(name, lambda: s3.delete(self._remote.path(name)), "deleted")
        else:
            self._remote.delete(name)

    def _sweep_scratch(self) -> None:
        for path in self._scratch.glob("*"):
            if processes.is_gone("-".join(path.name.split("-")[:3])):
                shutil.rmtree(path, ignore_errors=True)


def _side_by_side(action: Callable[[str], object], names: Iterable[str]) -> None:
    with ThreadPoolExecutor(_UPLOADS) as pool:
        list(pool.map(action, names))
