"""Every hash, number and id of a shard set, checked; all problems are found, not only the first.

Nothing in a set is trusted: what is no whole file of the set is named and left alone.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sm_train import files
from sm_train.data import mds
from sm_train.errors import UserError, printable

MALFORMED = (
    KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, OSError, struct.error,
    UserError,
)  # fmt: skip
"""What reading a file that somebody else wrote can end in."""

UTTERANCES = "utterances.parquet"
_SHOWN = 80


def short(text: object) -> str:
    """A name or a value, on one line."""
    return printable(text, _SHOWN)


@dataclass(frozen=True)
class Problem:
    """Something that is not as it was committed, and what to do, unless that is said already."""

    where: str
    what: str
    remedy: str

    def __str__(self) -> str:
        said = f"{printable(self.where, 300)}: {printable(self.what, 400)}"
        return f"{said}; {self.remedy}" if self.remedy else said


def reason(error: BaseException) -> str:
    """An error in a few words."""
    said = printable(" ".join(str(error).split()), 200)
    return said if isinstance(error, UserError | ValueError | OSError) else f"{type(error).__name__} {said}"


def read_inside(root: Path, name: str) -> dict[str, Any]:
    """A JSON object in a file of a set.

    Raises:
        UserError: it is no file of the set, or no JSON object.
    """
    return files.read_object(inside(root, name))


def inside(root: Path, name: object) -> Path:
    """The path of a file of a set.

    Raises:
        ValueError: it is not there, is no plain file, or lies outside the set.
    """
    base = root.resolve()
    try:
        path = (base / str(name)).resolve()
        if not path.is_relative_to(base):
            raise ValueError(f"the path {short(name)!r} leaves the set's folder")
        if not path.is_file():
            raise ValueError(f"file {short(name)!r} is not there")
    except (OSError, RuntimeError) as error:  # too long a name, a ring of links
        raise ValueError(f"file {short(name)!r} cannot be reached: {reason(error)}") from None
    return path


def differing(wanted: dict[str, Any], found: dict[str, Any], names: Iterable[str]) -> list[str]:
    """``name is X, not Y`` for each name whose two values differ."""
    return [
        f"{name} is {short(repr(found.get(name)))}, not {short(repr(wanted.get(name)))}"
        for name in names
        if found.get(name) != wanted.get(name)
    ]


def digest_of(path: Path) -> tuple[str, int]:
    """The xxh3 of a file, and its bytes."""
    return mds.file_digest(path), path.stat().st_size


def target_sets(root: Path) -> list[str]:
    """The names under which target sets are, or begin to be, there."""
    folder = root / "targets"
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
