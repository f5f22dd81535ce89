"""Files that are whole or absent: written aside, synced, then renamed. The only writer of small files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sm_train.errors import UserError

ASIDE = ".aside-"
"""How the names of unfinished files and folders begin; a killed writer leaves them behind."""


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file aside, then put it in ``path``'s place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{ASIDE}{path.name}-{os.getpid()}")
    try:
        write(aside)
        sync(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write text, whole or not at all."""
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys, whole or not at all: equal values give equal bytes."""
    write_whole(path, lambda aside: aside.write_bytes(json_bytes(value)))


def json_bytes(value: Any) -> bytes:
    """JSON with sorted keys: equal values give equal bytes."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        UserError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"file {path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"file {path} is not JSON: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: the file is missing or holds no JSON object.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"file {path} holds no JSON object")
    return value


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in some bytes.

    Raises:
        UserError: they are none; ``where`` they come from is named.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"file {where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"file {where} holds no JSON object")
    return value


def publish_folder(aside: Path, folder: Path, marker: str) -> None:
    """Sync every file of a finished folder, then rename it to its name.

    ``marker`` is the file that makes a folder whole. If a whole one stands there, another writer was first: it stays,
    and ours is removed. One without the marker (half removed by hand) gives way.
    """
    for path in sorted(aside.rglob("*")):
        sync(path)
    sync(aside)
    if folder.exists() and not (folder / marker).exists():
        shutil.rmtree(folder)
    try:
        os.rename(aside, folder)
    except OSError:
        if not (folder / marker).exists():
            raise
        shutil.rmtree(aside, ignore_errors=True)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
