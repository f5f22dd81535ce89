"""LibriSQA over LibriSpeech: LibriSQA-PartI/*.json, LibriSQA-PartII/*.json, and LibriSpeech's folders of .flac.

Part I's question and answer, Part II's question_and_option and answer (the option's letter); the text is the file's
own. train-clean-360 becomes the split train, test-clean keeps its name. An utterance in both parts has the questions
of both.
Layout: https://huggingface.co/datasets/ZihanZhao/LibriSQA (README), https://github.com/ZihanZhaoSJTU/LibriSQA
"""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from sm_train.errors import UserError
from tools.corpora import librispeech
from tools.corpora.entries import Entry, Skipped
from tools.corpora.reading import folder_of, json_file

_ID = re.compile(r"(\d+)-(\d+)-(\d+)")


def arguments(parser: ArgumentParser) -> None:
    """Options of its own."""
    parser.add_argument(
        "--librispeech", type=Path, help="folder with LibriSpeech's splits; by default SOURCE or SOURCE/LibriSpeech"
    )


def entries(source: Path, asked: Namespace, skipped: Skipped) -> Iterator[Entry]:
    """Each utterance once, with its questions."""
    paths = sorted(source.glob("LibriSQA-Part*.json")) + sorted(source.glob("LibriSQA-Part*/*.json"))
    if not paths:
        raise UserError(f"{source} is no LibriSQA: it has no LibriSQA-PartI/*.json and no LibriSQA-PartII/*.json")
    speech = folder_of(asked.librispeech or source, "LibriSpeech", ".")
    if speech is None or not any((speech / split).is_dir() for split in librispeech.SPLITS):
        raise UserError(
            f"{asked.librispeech or source} has no split of LibriSpeech; name its folder with --librispeech"
        )
    found: dict[str, Entry] = {}
    for path in paths:
        rows = json_file(path)
        if not isinstance(rows, list):
            raise UserError(f"{path} is not of LibriSQA's layout: a list of objects with speech_path, question, answer")
        for number, row in enumerate(rows, start=1):
            _add(found, row if isinstance(row, dict) else {}, f"{path.name}:{number}", speech, skipped)
    yield from found.values()


def _add(found: dict[str, Entry], row: dict[str, object], where: str, speech: Path, skipped: Skipped) -> None:
    place = PurePosixPath(str(row.get("speech_path", "")).replace("\\", "/"))
    match = _ID.fullmatch(place.stem)
    split = next((part for part in place.parts if part in librispeech.SPLITS), None)
    if match is None or split is None:
        skipped.add("bad_row", where, f"speech_path {str(place)!r} is no SPLIT/SPEAKER/CHAPTER/ID of LibriSpeech")
        return
    speaker, chapter, _ = match.groups()
    path = speech / split / speaker / chapter / f"{place.stem}.flac"
    text, name = str(row.get("text") or ""), librispeech.SPLITS[split]
    entry = Entry(place.stem, path, text, where, lang="en", speaker=speaker, split=name)
    known = found.setdefault(place.stem, entry)
    known.text = known.text or text
    known.ask(str(row.get("question") or row.get("question_and_option") or ""), str(row.get("answer") or ""))
