"""Europarl-ST v1.1: SRC/audios/SPEECH.*, SRC/TGT/{train,dev,test}/segments.lst, segments.SRC and segments.TGT.

A line of segments.lst is ``SPEECH START END`` in seconds, the same line of segments.SRC and segments.TGT its
transcript and translation; speakers.lst, beside speeches.lst, has the speakers. The same segment under several
targets is one utterance with several translations. The corpus comes as .m4a, which libsndfile does not read: convert
it first, to .flac or .wav beside.
Layout: https://www.mllp.upv.es/europarl-st/ and the README of the archive
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

from sm_train.errors import UserError
from sm_train.prompts import LANGUAGES
from tools.corpora.entries import Entry, Skipped
from tools.corpora.reading import AUDIO_SUFFIXES, below, number

_SPLITS = ("test", "dev", "train")
"""In this order, so that a segment that one pair tests on is never trained on through another pair."""
_REMEDY = 'for f in {0}/*.m4a; do ffmpeg -i "$f" -ac 1 -ar 16000 "${{f%.m4a}}.flac"; done'


def arguments(parser: ArgumentParser) -> None:
    """Options of its own."""
    parser.add_argument("--pairs", nargs="+", metavar="SRC-TGT", help="as en-fr en-de; by default all that are there")


def entries(source: Path, asked: Namespace, skipped: Skipped) -> Iterator[Entry]:
    """Every segment once, with its translations."""
    there = sorted(path.parts[-4:-2] for path in source.glob("*/*/*/segments.lst"))
    there = [pair for pair in dict.fromkeys(there) if set(pair) <= LANGUAGES.keys()]
    wanted = [tuple(pair.split("-", 1)) for pair in asked.pairs or ()] or there
    if not there or any(pair not in there for pair in wanted):
        has = ", ".join("-".join(pair) for pair in there) or "no SRC/TGT/train/segments.lst"
        raise UserError(f"{source}: of Europarl-ST v1.1 it has {has}, not {' '.join(asked.pairs or ['any pair'])}")
    for spoken in dict.fromkeys(pair[0] for pair in wanted):
        speeches = _speeches(source / spoken / "audios")
        found: dict[str, Entry] = {}
        for split in _SPLITS:
            for target in (pair[1] for pair in wanted if pair[0] == spoken):
                _add_segments(found, source / spoken / target / split, spoken, target, speeches, skipped)
        yield from found.values()


def _speeches(folder: Path) -> dict[str, Path]:
    """The readable file of each speech."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    readable = {path.stem: path for path in reversed(paths) if path.suffix.lower() in AUDIO_SUFFIXES}
    if not readable:
        if any(path.suffix == ".m4a" for path in paths):
            raise UserError(f"{folder} holds .m4a files, which libsndfile does not read: {_REMEDY.format(folder)}")
        raise UserError(f"{folder} holds no audio file")
    return readable | {path.stem: path for path in paths if path.suffix == ".m4a" and path.stem not in readable}


def _add_segments(
    found: dict[str, Entry], folder: Path, spoken: str, target: str, speeches: dict[str, Path], skipped: Skipped
) -> None:
    listed = _column(folder / "segments.lst")
    if not listed:
        return
    speakers = dict(zip(_column(folder / "speeches.lst"), _column(folder / "speakers.lst"), strict=False))
    texts, translations = _column(folder / f"segments.{spoken}"), _column(folder / f"segments.{target}")
    if not len(listed) == len(texts) == len(translations):
        counts = f"{len(listed)}, {len(texts)} and {len(translations)} lines"
        skipped.add("bad_file", str(folder), f"segments.lst, .{spoken} and .{target} have {counts}")
        return
    for row, (segment, text, translation) in enumerate(zip(listed, texts, translations, strict=True), start=1):
        where = f"{spoken}/{target}/{folder.name}/segments.lst:{row}"
        try:
            speech, start, end = segment.split()
            start_s, end_s = number(start), number(end)
        except ValueError as error:
            skipped.add("bad_row", where, f"{segment!r}: SPEECH START END is wanted ({error})")
            continue
        audio = speeches.get(speech) or below(folder.parents[1] / "audios", f"{speech}.flac")
        if audio is None:
            skipped.add("outside", where, f"{speech!r} is no name of a file")
            continue
        identity = f"{speech}_{round(start_s * 1000):07d}_{round(end_s * 1000):07d}"
        speaker = speakers.get(speech, "")
        entry = Entry(identity, audio, text, where, start_s, end_s - start_s, spoken, speaker, folder.name)
        known = found.setdefault(identity, entry)
        if known.split == entry.split:
            known.translate(target, translation)
        else:
            skipped.add("two_splits", where, f"{identity!r} is in {known.split} by {known.where}")


def _column(path: Path) -> list[str]:
    """The lines of a file, empty ones too: their numbers say what belongs together."""
    return path.read_bytes().decode("utf-8", "replace").removesuffix("\n").split("\n") if path.is_file() else []
