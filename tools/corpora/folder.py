"""A folder of audio files with a NAME.txt beside each, or with one file of ``ID|text`` lines (LJSpeech's metadata.csv).

An id is the file's name without suffix, with the folders that tell it from others of the name before it (a-b-name);
folders that are links are not entered. In a file of lines the last field is the text: LJSpeech's is the normalised
one.
Layout: https://keithito.com/LJ-Speech-Dataset/
"""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

from sm_train.errors import UserError
from tools.corpora.entries import Entry, Skipped
from tools.corpora.reading import AUDIO_SUFFIXES, lines, unique_names

_LISTS = ("metadata.csv", "metadata.txt")


def arguments(parser: ArgumentParser) -> None:
    """Options of its own."""
    parser.add_argument(
        "--transcripts", type=Path, help="file of ID|text lines; by default SOURCE/metadata.csv if there"
    )


def entries(source: Path, asked: Namespace, skipped: Skipped) -> Iterator[Entry]:
    """The audio files of a folder that have a text."""
    paths = sorted(_walk(source))
    if not paths:
        raise UserError(f"{source} holds no audio file ({', '.join(AUDIO_SUFFIXES)})")
    names = unique_names(path.relative_to(source) for path in paths)
    by_name: dict[str, Path] = {}
    for path, name in names.items():
        if by_name.setdefault(name, source / path) != source / path:
            skipped.add("duplicate_id", path.as_posix(), f"{by_name[name].name} has the name {name!r} already")
    transcripts = asked.transcripts or next((source / name for name in _LISTS if (source / name).is_file()), None)
    if transcripts:
        yield from _listed(transcripts, by_name, skipped)
        return
    for name, path in sorted(by_name.items()):
        where = path.relative_to(source).as_posix()
        text_path = path.with_suffix(".txt")
        if not text_path.is_file():
            skipped.add("no_text", where, f"there is no {text_path.name} beside it")
            continue
        yield Entry(name, path, " ".join(line for _, line in lines(text_path, skipped)), where)


def _listed(transcripts: Path, by_name: dict[str, Path], skipped: Skipped) -> Iterator[Entry]:
    for where, line in lines(transcripts, skipped):
        identity, bar, _ = line.partition("|")
        identity = Path(identity).stem if Path(identity).suffix in AUDIO_SUFFIXES else identity
        if not bar:
            skipped.add("bad_row", where, "ID|text is wanted")
        elif identity not in by_name:
            skipped.add("missing_audio", where, f"no audio file is named {identity!r}")
        else:
            yield Entry(identity, by_name[identity], line.rpartition("|")[2], where)


def _walk(source: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(source):
        yield from (Path(folder, name) for name in names if Path(name).suffix.lower() in AUDIO_SUFFIXES)
