"""Kaldi data folder: wav.scp, text, and where they are there segments, utt2spk, utt2lang.

SOURCE is such a folder, or one whose folders are (data/train, data/dev: their names are the splits). Relative paths
in wav.scp start at --audio-root, by default at the folder of wav.scp. A command (``... |``) is never run, and an
offset into an archive (``x.ark:17``) not followed: such lines are left out by number.
Layout: https://kaldi-asr.org/doc/data_prep.html
"""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

from sm_train.errors import UserError
from tools.corpora.entries import Entry, Skipped
from tools.corpora.reading import number, pairs

_ARCHIVE = re.compile(r"\.(ark|scp|gz):\d+(\[.*\])?$|^(scp|ark)[,:]")
Recording = tuple[Path, str]


def arguments(parser: ArgumentParser) -> None:
    """Options of its own."""
    parser.add_argument("--audio-root", type=Path, help="folder that relative paths in wav.scp start at")


def entries(source: Path, asked: Namespace, skipped: Skipped) -> Iterator[Entry]:
    """The utterances of one data folder, or of each below a folder."""
    if (source / "wav.scp").is_file():
        yield from _of_folder(source, "", asked, skipped)
        return
    folders = sorted(path.parent for path in source.glob("*/wav.scp"))
    if not folders:
        raise UserError(f"{source} is no Kaldi data folder: it has no wav.scp, and no folder in it has one")
    for folder in folders:
        yield from _of_folder(folder, folder.name, asked, skipped)


def _of_folder(folder: Path, split: str, asked: Namespace, skipped: Skipped) -> Iterator[Entry]:
    if not (folder / "text").is_file():
        raise UserError(f"{folder} has wav.scp but no text; a manifest needs transcripts")
    recordings = _recordings(folder, asked.audio_root or folder, skipped)
    text, speakers, langs = (pairs(folder / name, skipped) for name in ("text", "utt2spk", "utt2lang"))
    pieces = pairs(folder / "segments", skipped) if (folder / "segments").is_file() else None
    for identity, (_, where) in (recordings if pieces is None else pieces).items():
        if identity not in text:
            skipped.add("empty_text", where, f"{identity!r} is not in text")
    for identity, (words, where) in text.items():
        lang, speaker = (found.get(identity, ("", ""))[0] for found in (langs, speakers))
        recording, start_s, duration_s, one_channel = identity, 0.0, None, False
        if pieces is not None:
            if identity not in pieces:
                skipped.add("no_segment", where, f"{identity!r} is not in segments")
                continue
            try:
                recording, start_s, duration_s, one_channel = _segment(*pieces[identity])
            except ValueError as error:
                skipped.add("bad_row", pieces[identity][1], str(error))
                continue
        if recording not in recordings:
            skipped.add("missing_audio", where, f"wav.scp has no usable line for {recording!r}")
            continue
        audio = recordings[recording][0]
        yield Entry(identity, audio, words, where, start_s, duration_s, lang, speaker, split, one_channel)


def _recordings(folder: Path, root: Path, skipped: Skipped) -> dict[str, Recording]:
    found = {}
    for recording, (path, where) in pairs(folder / "wav.scp", skipped).items():
        if path.endswith("|"):
            detail = "a command, which is never run; write the audio out with wav-copy scp:wav.scp, and name the files"
            skipped.add("command", where, detail)
        elif _ARCHIVE.search(path):
            detail = f"{path!r} is a place in an archive; write the audio out with wav-copy, and name the files"
            skipped.add("archive", where, detail)
        else:
            found[recording] = (root / path, where)
    return found


def _segment(rest: str, where: str) -> tuple[str, float, float | None, bool]:
    """Recording, start, duration (an end of -1 is the recording's), and whether a channel is named."""
    words = rest.split()
    if len(words) not in (3, 4):
        raise ValueError(f"{where}: a recording, a start and an end are wanted, not {rest!r}")
    start_s, end_s = number(words[1]), number(words[2])
    return words[0], start_s, None if end_s == -1 else end_s - start_s, len(words) == 4
