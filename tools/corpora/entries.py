"""What an importer says: entries, and what it had to leave out."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from sm_train.prompts import LANGUAGES
from sm_train.records import Task

SHOWN = 5
_CODES = {name.lower(): code for code, name in LANGUAGES.items()}


@dataclass(slots=True)
class Entry:
    """One utterance as a corpus has it; the writer measures and checks it."""

    id: str
    audio: Path
    text: str
    where: str
    """The file and line, or row, that says so: what a report names."""
    start_s: float = 0.0
    duration_s: float | None = None
    """None: up to the file's end."""
    lang: str = ""
    speaker: str = ""
    split: str = ""
    """Empty, as lang and speaker: the corpus does not say, ``--split`` and the like do."""
    one_channel: bool = False
    """The corpus means one channel of the file: refused where there are more, since all are mixed."""
    tasks: list[Task] = field(default_factory=list)
    """Translations and questions; transcription is added by the writer."""

    def translate(self, lang: str, text: str) -> None:
        """Add a translation; an empty one is none."""
        if text.strip():
            self.tasks.append(Task(self.id, "st", {}, code(lang), one_line(text)))

    def ask(self, question: str, answer: str) -> None:
        """Add a question about the speech; one without an answer is none."""
        if question.strip() and answer.strip():
            self.tasks.append(Task(self.id, "sqa", {"question": one_line(question)}, "en", one_line(answer)))


class Skipped:
    """Rows that were left out: how many for each reason, and where the first ones are."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = defaultdict(int)
        self.first: dict[str, list[tuple[str, str]]] = defaultdict(list)

    def add(self, reason: str, where: str, detail: str) -> None:
        """Count a row; the reasons that precompute also knows have its names."""
        self.counts[reason] += 1
        if len(self.first[reason]) < SHOWN:
            self.first[reason].append((where, detail))

    def lines(self) -> list[str]:
        """A line for each reason, the most frequent first."""
        lines = []
        for reason, count in sorted(self.counts.items(), key=lambda item: (-item[1], item[0])):
            places = ", ".join(where for where, _ in self.first[reason])
            more = ", ..." if count > SHOWN else ""
            lines.append(f"{count} {reason}: {places}{more} ({self.first[reason][0][1]})")
        return lines


class Importer(Protocol):
    """One format: a module, or anything else, with a docstring and these two functions."""

    __doc__: str | None

    def arguments(self, parser: ArgumentParser) -> None:
        """Declare the options that this format alone has."""

    def entries(self, source: Path, asked: Namespace, skipped: Skipped) -> Iterator[Entry]:
        """The utterances of a corpus, in an order that depends on the corpus alone.

        Raises:
            UserError: the source is not of this layout.
        """


def one_line(text: str) -> str:
    """Text with every run of white space as one space."""
    return " ".join(text.split())


def code(lang: str) -> str:
    """A language as its ISO 639-1 code where it has one that prompts know: en-US, EN, English -> en."""
    lang = lang.strip()
    if lang.lower() in _CODES:
        return _CODES[lang.lower()]
    first = lang.replace("_", "-").partition("-")[0].lower()
    return first if first in LANGUAGES else lang
