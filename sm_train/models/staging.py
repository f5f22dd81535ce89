"""A checkpoint's files, copied to a disk of the node before they are read: once a node, whatever its ranks.

On a shared file system every rank of every node would read the same gigabytes. The first rank of a node that comes
copies them; the others wait for its lock. A copy is whole or absent, and stays for later runs.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from sm_train import files
from sm_train.data.mds import digest, file_digest
from sm_train.errors import UserError
from sm_train.models import checkpoints

MARKER = "staged.json"
_SMALL = ("*.json", "*.model", "*.jinja", "*.txt")
_BLOCK = 1 << 22
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_FRESH_S = 600.0
"""For so long after a copy's hashes were compared, other ranks of the node compare its sizes alone."""


def stage(folder: Path, to: str | None) -> Path:
    """The folder to read a checkpoint from: its copy below ``to``, which is made unless it is there; itself without.

    Raises:
        UserError: the disk has no room for it, or the copy is not what was read.
    """
    if not to:
        return folder
    root, wanted = Path(to), _wanted(folder)
    copy = root / _name(folder, wanted)
    needed = sum(path.stat().st_size for path in wanted.values())
    if root.exists() and not root.is_dir():
        raise UserError(f"stage_to {root} is a file; name a folder on the node's own disk")
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root / f".{copy.name}.lock"):
        if _is_whole(copy):
            return copy
        try:
            _copy(wanted, needed, copy)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            free = shutil.disk_usage(root).free
            raise UserError(
                f"stage_to {root}: {folder} needs {needed} bytes there, {free} are free; name a larger disk, remove "
                "what is not used, or leave stage_to out"
            ) from None
    return copy


def _wanted(folder: Path) -> dict[str, Path]:
    """The files that a model and its tokenizer are made from, by name."""
    small = {path.name: path for pattern in _SMALL for path in folder.glob(pattern) if path.name != MARKER}
    return small | {path.name: path for path in checkpoints.weight_map(folder).values()}


def _name(folder: Path, wanted: dict[str, Path]) -> str:
    """Another content is another name: by a fingerprint, size and time of the weights, and every byte of the rest."""
    small = [f"{name} {file_digest(path)}" for name, path in sorted(wanted.items()) if path.suffix != ".safetensors"]
    large = [(name, path.stat()) for name, path in sorted(wanted.items()) if path.suffix == ".safetensors"]
    changed = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in large]
    whole = digest("\n".join([checkpoints.fingerprint(folder), *changed, *small]).encode())
    return f"{folder.resolve().name}-{whole}"


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Be the one process of the node in here; the lock of a killed one is free."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_whole(copy: Path) -> bool:
    """Whether a copy is there, and its files are those that were copied; a damaged one is removed."""
    marker = copy / MARKER
    if not marker.is_file():
        return False
    is_fresh = 0 <= time.time() - marker.stat().st_mtime < _FRESH_S
    try:
        copied = files.read_object(marker)
    except UserError:
        shutil.rmtree(copy)
        return False
    for name, said in copied.items():
        path = copy / name
        is_same = path.is_file() and path.stat().st_size == said["bytes"]
        if not is_same or not (is_fresh or file_digest(path) == said["xxh3"]):
            print(f"{path} is not as it was copied; all of {copy.name} is copied again", flush=True)
            shutil.rmtree(copy)
            return False
    if not is_fresh:
        os.utime(marker)
    return True


def _copy(wanted: dict[str, Path], needed: int, copy: Path) -> None:
    aside = copy.with_name(f"{files.ASIDE}{copy.name}")
    shutil.rmtree(aside, ignore_errors=True)
    if needed > shutil.disk_usage(copy.parent).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    print(f"{copy}: {needed / 1e9:.2f} GB are copied there", flush=True)
    try:
        aside.mkdir()
        files.write_json(aside / MARKER, {name: _copied(path, aside / name) for name, path in sorted(wanted.items())})
        files.publish_folder(aside, copy, MARKER)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _copied(source: Path, target: Path) -> dict[str, object]:
    """Copy a file, and read it back from the disk: its bytes and xxh3.

    Raises:
        UserError: the copy is not what was read.
    """
    hasher, block, size = xxhash.xxh3_64(), bytearray(_BLOCK), source.stat().st_size
    with source.open("rb", buffering=0) as theirs, target.open("wb") as ours:
        while count := theirs.readinto(block):
            hasher.update(memoryview(block)[:count])
            ours.write(memoryview(block)[:count])
        ours.flush()
        os.fsync(ours.fileno())
        os.posix_fadvise(ours.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that the disk is read, not memory
    if target.stat().st_size != size or file_digest(target) != hasher.hexdigest():
        raise UserError(f"{target} is not what was read from {source}; the disk or the network damages data")
    return {"bytes": size, "xxh3": hasher.hexdigest()}
