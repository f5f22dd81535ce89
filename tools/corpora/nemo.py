"""NeMo manifest: JSON lines with audio_filepath, text, and where they are there duration, offset, lang, speaker, id.

SOURCE is a manifest, or a folder of them (*.json, *.jsonl: their names are the splits). Relative paths start at
--audio-root, by default at the manifest's folder. In Canary's manifests a row whose target_lang is not its
source_lang has a translation as its text (or answer): it is joined with the row that transcribes the same audio.
``question`` and ``answer`` are a question about the speech, ``translations`` an object {"fr": ...}. Without an id the
file's name is one.
Layout: https://docs.nvidia.com/nemo/speech/latest/asr/datasets.html
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sm_train.errors import UserError
from tools.corpora.entries import Entry, Skipped, code
from tools.corpora.reading import first_of, json_lines, number, unique_names

Row = dict[str, Any]
Place = tuple[Path, float, float | None]
Key = tuple[Place, str]
"""A piece of audio, and the id that a row gives it, if any."""


def arguments(parser: ArgumentParser) -> None:
    """Options of its own."""
    parser.add_argument("--audio-root", type=Path, help="folder that relative audio paths start at")


def entries(source: Path, asked: Namespace, skipped: Skipped) -> Iterator[Entry]:
    """Each piece of audio once, with its translations and questions."""
    manifests = sorted([*source.glob("*.json"), *source.glob("*.jsonl")]) if source.is_dir() else [source]
    if not manifests:
        raise UserError(f"{source} holds no NeMo manifest (*.json, *.jsonl)")
    rows = [row for path in manifests for row in _rows(path, asked, source.is_dir(), skipped)]
    names = unique_names(place[0] for _, place, _, _ in rows)
    cut = {path for _, (path, start_s, _), _, _ in rows if start_s}
    found: dict[Key, Entry] = {}
    for transcribed in (True, False):
        for where, place, split, row in rows:
            if _is_transcript(row) == transcribed:
                _add(found, names[place[0]], place[0] in cut, where, place, split, row, skipped)
    yield from found.values()


def _rows(path: Path, asked: Namespace, named: bool, skipped: Skipped) -> Iterator[tuple[str, Place, str, Row]]:
    for where, row in json_lines(path, skipped):
        audio = row.get("audio_filepath")
        if not isinstance(audio, str) or not audio:
            skipped.add("bad_row", where, "there is no audio_filepath")
            continue
        try:
            duration_s = None if row.get("duration") is None else number(row["duration"])
            place = ((asked.audio_root or path.parent) / audio, number(row.get("offset") or 0.0), duration_s)
        except ValueError as error:
            skipped.add("bad_row", where, str(error))
            continue
        yield where, place, str(row.get("split") or (path.stem if named else "")), row


def _is_transcript(row: Row) -> bool:
    spoken, target = _lang(row), str(row.get("target_lang") or "")
    return not target or not spoken or code(target) == code(spoken)


def _lang(row: Row) -> str:
    return str(first_of(row, ("source_lang", "lang", "language")))


def _add(
    found: dict[Key, Entry], name: str, is_cut: bool, where: str, place: Place, split: str, row: Row, skipped: Skipped
) -> None:
    text, answer = str(row.get("text") or ""), str(row.get("answer") or "")
    question = str(first_of(row, ("question", "context")))
    given = str(first_of(row, ("id", "utt_id", "uniq_id")))
    if not _is_transcript(row):
        if spoken := found.get((place, given)) or found.get((place, "")):
            spoken.translate(str(row["target_lang"]), text or answer)
        else:
            skipped.add("no_transcript", where, f"a translation of {place[0].name}, which no row transcribes")
        return
    if is_cut:
        end = "end" if place[2] is None else f"{round((place[1] + place[2]) * 1000):07d}"
        name = f"{name}_{round(place[1] * 1000):07d}_{end}"
    speaker = str(first_of(row, ("speaker", "speaker_id")))
    text = text or ("" if question else answer)  # Canary's answer is the transcript, a question's is not
    entry = Entry(given or name, place[0], text, where, *place[1:], _lang(row), speaker, split)
    known = found.setdefault((place, given), entry)
    if known.where != where and not question:
        skipped.add("duplicate_audio", where, f"the same piece of {place[0].name} is in {known.where}")
        return
    known.text = known.text or text
    translations = row.get("translations")
    for lang, translation in sorted(translations.items()) if isinstance(translations, dict) else ():
        known.translate(str(lang), str(translation or ""))
    known.ask(question, answer)
