"""How importers read files that others wrote: nothing is run, no line ends the import, no name leaves its folder."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from sm_train.errors import UserError
from tools.corpora.entries import Skipped

AUDIO_SUFFIXES = (".flac", ".wav", ".mp3", ".ogg", ".opus")
LONGEST_LINE = 1 << 24
"""Bytes; a compressed file may hold anything."""


def lines(path: Path, skipped: Skipped) -> Iterator[tuple[str, str]]:
    """(place, line) of a text file, plain or .gz, empty lines left out; lines that are not UTF-8 are counted.

    Raises:
        UserError: the file does not exist, cannot be read, or has a line beyond 16 MiB.
    """
    try:
        with _opened(path) as file:
            for number, raw in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), start=1):
                where = f"{path.name}:{number}"
                if len(raw) > LONGEST_LINE:
                    raise UserError(
                        f"{path}, line {number} is longer than {LONGEST_LINE >> 20} MiB: no list of utterances"
                    )
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    skipped.add("not_utf8", where, str(error))
                    continue
                if line.strip():
                    yield where, line
    except FileNotFoundError:
        raise UserError(f"file {path} does not exist") from None
    except (OSError, EOFError) as error:
        raise UserError(f"file {path} cannot be read to its end: {error}") from None


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def pairs(path: Path, skipped: Skipped) -> dict[str, tuple[str, str]]:
    """``key rest of the line`` as key -> (rest, place); a file that is not there is empty, a second key is counted."""
    found: dict[str, tuple[str, str]] = {}
    for where, line in lines(path, skipped) if path.is_file() else ():
        key, _, rest = line.strip().replace("\t", " ", 1).partition(" ")
        if key in found:
            skipped.add("duplicate_line", where, f"{key!r} is in {found[key][1]} already, which is taken")
        else:
            found[key] = (rest.strip(), where)
    return found


def json_lines(path: Path, skipped: Skipped) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of a JSONL file, plain or .gz; lines that are no JSON object are counted."""
    for where, line in lines(path, skipped):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            skipped.add("not_json", where, str(error))
            continue
        if isinstance(value, dict):
            yield where, value
        else:
            skipped.add("not_json", where, "a JSON object is wanted")


def json_file(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        UserError: it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"file {path} cannot be read as JSON: {error}") from None


def table(path: Path, skipped: Skipped) -> Iterator[tuple[str, dict[str, str]]]:
    """(place, row) of a tab-separated file with a header and no quoting; rows of another width are counted."""
    found = lines(path, skipped)
    _, first = next(found, ("", ""))
    names = first.split("\t")
    for where, line in found:
        cells = line.split("\t")
        if len(cells) == len(names):
            yield where, dict(zip(names, cells, strict=True))
        else:
            skipped.add("bad_row", where, f"{len(cells)} columns where the header has {len(names)}")


def number(value: Any) -> float:
    """A finite number.

    Raises:
        ValueError: it is none.
    """
    try:
        found = float(value)
    except (TypeError, OverflowError):
        raise ValueError(f"{value!r} is no number") from None
    if not abs(found) < 1e9:
        raise ValueError(f"{value!r} is no time in seconds")
    return found


def below(folder: Path, name: str) -> Path | None:
    """``folder/name`` if the name stays in the folder: no absolute path, no ``..``; else None."""
    path = Path(name)
    return None if not name or path.is_absolute() or ".." in path.parts or "\0" in name else folder / path


def folder_of(source: Path, *names: str) -> Path | None:
    """The first of some folders below a source that exists; ``.`` is the source itself."""
    return next((source / name for name in names if (source / name).is_dir()), None)


def unique_names(paths: Iterable[Path]) -> dict[Path, str]:
    """A name for each file: its stem, with as many parent folders before it as tell it from the others."""
    stems = {path: (*path.parent.parts, path.stem) for path in dict.fromkeys(paths)}
    names: dict[Path, str] = {}
    depth, left = 1, list(stems)
    while left:
        tried = {path: "-".join(part.strip("/") for part in stems[path][-depth:]) for path in left}
        counts = Counter(tried.values())
        done = depth > max(len(stems[path]) for path in left)
        names.update({path: name for path, name in tried.items() if counts[name] == 1 or done})
        left, depth = [path for path in left if path not in names], depth + 1
    return names


def first_of(row: dict[str, Any], names: Sequence[str]) -> Any:
    """The first of some fields that is there and not empty; else an empty string."""
    return next((row[name] for name in names if row.get(name) not in (None, "")), "")
