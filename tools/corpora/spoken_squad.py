"""Spoken-SQuAD: spoken_train-v1.1.json, spoken_test-v1.1.json and Spoken-SQuAD_audio/{train_wav,dev_wav}/T_P_S.wav.

A .wav is one sentence: topic, paragraph and sentence of the JSON file. A question is about a paragraph. With ``--unit
sentence`` an utterance is a sentence, and a question goes to the one that holds its answer; with ``--unit paragraph``
the sentences are joined (OUT/audio/T_P.wav), and every question goes to its paragraph, as in the paper: about a
minute of speech each, so look at max_duration_s. The text is the corpus's recognised one (about 23% WER). The first
answer of a question is taken.
Layout: https://github.com/Chia-Hsuan-Lee/Spoken-SQuAD (README)
"""

from __future__ import annotations

import os
import re
import wave
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sm_train.errors import UserError
from tools.corpora.entries import Entry, Skipped
from tools.corpora.reading import folder_of, json_file

_FILES = (("spoken_train-v1.1.json", "train_wav", "train"), ("spoken_test-v1.1.json", "dev_wav", "test"))
_SENTENCE = re.compile(r"(\d+)_(\d+)_(\d+)\.wav")
Paragraph = tuple[int, int]


def arguments(parser: ArgumentParser) -> None:
    """Options of its own."""
    parser.add_argument("--unit", choices=("sentence", "paragraph"), default="sentence", help="what an utterance is")


def entries(source: Path, asked: Namespace, skipped: Skipped) -> Iterator[Entry]:
    """Sentences or paragraphs, with their questions."""
    there = [row for row in _FILES if (source / row[0]).is_file()]
    if not there:
        raise UserError(f"{source} is no Spoken-SQuAD: it has neither {_FILES[0][0]} nor {_FILES[1][0]}")
    for name, wav, split in there:
        folder = folder_of(source, f"Spoken-SQuAD_audio/{wav}", wav)
        if folder is None:
            raise UserError(f"{source} has {name}, but neither Spoken-SQuAD_audio/{wav} nor {wav}")
        sentences = _sentences(folder)
        for number, where, paragraph in _paragraphs(source / name, skipped):
            parts, text, questions = sentences.get(number, []), paragraph["context"], paragraph["qas"]
            identity = f"spoken-squad-{split}-{number[0]}_{number[1]}"
            if not parts:
                skipped.add("missing_audio", where, f"{folder} has no {number[0]}_{number[1]}_*.wav")
            elif asked.unit == "paragraph":
                yield from _whole(identity, parts, text, questions, where, split, asked.out / "audio", skipped)
            else:
                yield from _by_sentence(identity, parts, text, questions, where, split, skipped)


def _sentences(folder: Path) -> dict[Paragraph, list[Path]]:
    """The files of each paragraph, in the order of its sentences."""
    found: dict[Paragraph, list[tuple[int, Path]]] = defaultdict(list)
    for path in folder.iterdir():
        if match := _SENTENCE.fullmatch(path.name):
            topic, paragraph, sentence = map(int, match.groups())
            found[topic, paragraph].append((sentence, path))
    return {number: [path for _, path in sorted(parts)] for number, parts in found.items()}


def _paragraphs(path: Path, skipped: Skipped) -> Iterator[tuple[Paragraph, str, dict[str, Any]]]:
    topics = json_file(path)
    try:
        numbered = [
            ((t, p), par) for t, topic in enumerate(topics["data"]) for p, par in enumerate(topic["paragraphs"])
        ]
    except (TypeError, KeyError):
        raise UserError(f'{path} is not of SQuAD\'s layout: {{"data": [{{"paragraphs": [...]}}]}}') from None
    for number, paragraph in numbered:
        where = f"{path.name}:{number[0]}_{number[1]}"
        try:
            answered = [(str(q["question"]), q["answers"][0]) for q in paragraph["qas"] if q["answers"]]
            qas = [(q, str(a["text"]), int(a["answer_start"])) for q, a in answered]
            yield number, where, {"context": str(paragraph["context"]), "qas": qas}
        except (TypeError, KeyError, ValueError, IndexError) as error:
            skipped.add("bad_row", where, f"no paragraph of SQuAD: {error!r}")


def _by_sentence(
    identity: str, parts: Sequence[Path], text: str, questions: Sequence[tuple[str, str, int]], where: str, split: str,
    skipped: Skipped,
) -> Iterator[Entry]:  # fmt: skip
    said = [sentence.strip(" .") for sentence in text.split(". ")]
    if len(said) != len(parts):
        skipped.add(
            "sentences", where, f"{len(said)} sentences in the text, {len(parts)} files; --unit paragraph takes it"
        )
        return
    found = [
        Entry(f"{identity}_{i}", path, words, where, lang="en", split=split)
        for i, (path, words) in enumerate(zip(parts, said, strict=True))
    ]
    for question, answer, start in questions:
        holder = text.count(". ", 0, start)
        if answer in said[holder]:
            found[holder].ask(question, answer)
        else:
            skipped.add("answer_not_found", where, f"{answer!r} is not in the sentence it should be in")
    yield from found


def _whole(
    identity: str, parts: Sequence[Path], text: str, questions: Sequence[tuple[str, str, int]], where: str, split: str,
    folder: Path, skipped: Skipped,
) -> Iterator[Entry]:  # fmt: skip
    path = folder / f"{identity}.wav"
    try:
        _join(parts, path)
    except (OSError, EOFError, wave.Error) as error:
        skipped.add("undecodable", where, f"{parts[0].parent}: {error}")
        return
    entry = Entry(identity, path, text, where, lang="en", split=split)
    for question, answer, _ in questions:
        entry.ask(question, answer)
    yield entry


def _join(parts: Sequence[Path], path: Path) -> None:
    """PCM files of one kind, one after the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".aside-{path.name}")
    try:
        _concatenate(parts, aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _concatenate(parts: Sequence[Path], path: Path) -> None:
    with wave.open(str(path), "wb") as joined:
        for i, part in enumerate(parts):
            with wave.open(str(part), "rb") as one:
                if i and one.getparams()[:3] != joined.getparams()[:3]:
                    raise wave.Error(f"{part.name} is of another kind than {parts[0].name}")
                if not i:
                    joined.setparams(one.getparams())
                joined.writeframes(one.readframes(one.getnframes()))
