"""The words of the miniature world: typed rows of ``lexicon/*.tsv``.

``NAME.tsv`` serves both levels; ``NAME_more.tsv``, where it exists, adds rows for the level "hard". A dash means that
there is no such form. Codes: a French gender ending in h has an aspirated h (le hibou); a German
gender ending in w is a weak noun (den Löwen), whose accusative and dative singular equal its plural.
"""

from __future__ import annotations

import csv
import hashlib
import typing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

FOLDER = Path(__file__).parent / "lexicon"
LEVELS = ("easy", "hard")
Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Noun:
    """A noun or, with kind "name", a first name, which has no plural and no determiner."""

    kind: str
    en: str
    en_plural: str
    fr: str
    fr_plural: str
    fr_gender: str
    de: str
    de_plural: str
    de_gender: str
    places: tuple[str, ...]
    """The English prepositions that make an adverbial of place with this noun."""

    @property
    def is_name(self) -> bool:
        return self.kind == "name"

    @property
    def is_mass(self) -> bool:
        return self.kind in ("food", "drink")


@dataclass(frozen=True, slots=True)
class Adjective:
    """An adjective; ``kinds`` are the kinds of noun it goes with, ``before`` is "yes" where French puts it first."""

    group: str
    en: str
    fr_m: str
    fr_f: str
    fr_mp: str
    fr_fp: str
    fr_vowel: str
    before: str
    de: str
    de_stem: str
    kinds: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb; ``frame`` says what it takes: object, none, motion, giving or modal."""

    frame: str
    en: str
    en_third: str
    en_past: str
    fr: str
    fr_third: str
    fr_plural: str
    fr_participle: str
    fr_aux: str
    """a avoir, e être"""
    de: str
    de_third: str
    de_participle: str
    de_aux: str
    """h haben, s sein"""
    de_prefix: str
    """The separable prefix, which ends the clause."""
    subjects: tuple[str, ...]
    objects: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Time:
    """An adverbial of time and the tenses it goes with: present, past, modal."""

    en: str
    fr: str
    de: str
    tenses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Preposition:
    en: str
    fr: str
    de: str
    de_case: str


@dataclass(frozen=True, slots=True)
class Determiner:
    """An article, possessive, demonstrative or numeral; ``declension`` rules the German endings after it."""

    en: str
    number: str
    fr_m: str
    fr_f: str
    fr_m_vowel: str
    fr_f_vowel: str
    fr_plural: str
    de: str
    declension: str


@dataclass(frozen=True, slots=True)
class Lexicon:
    """Every word the grammar can use."""

    nouns: tuple[Noun, ...]
    adjectives: tuple[Adjective, ...]
    verbs: tuple[Verb, ...]
    times: tuple[Time, ...]
    prepositions: dict[str, Preposition]
    determiners: dict[str, Determiner]

    def noun(self, en: str) -> Noun:
        """The noun with this English singular; KeyError if there is none."""
        return _only(self.nouns, en)

    def adjective(self, en: str) -> Adjective:
        return _only(self.adjectives, en)

    def verb(self, en: str) -> Verb:
        return _only(self.verbs, en)

    def time(self, en: str) -> Time:
        return _only(self.times, en)


@cache
def read(level: str = "easy") -> Lexicon:
    """The lexicon of a level, in the order of the files.

    Raises:
        ValueError: the level is unknown or a row has the wrong number of columns.
    """
    if level not in LEVELS:
        raise ValueError(f"level {level!r} is unknown; choose one of {', '.join(LEVELS)}")
    prepositions = _rows(Preposition, "prepositions", level)
    determiners = _rows(Determiner, "determiners", level)
    return Lexicon(
        nouns=_rows(Noun, "nouns", level),
        adjectives=_rows(Adjective, "adjectives", level),
        verbs=_rows(Verb, "verbs", level),
        times=_rows(Time, "times", level),
        prepositions={row.en: row for row in prepositions},
        determiners={row.en: row for row in determiners},
    )


def _rows(kind: type[Row], name: str, level: str) -> tuple[Row, ...]:
    paths = [FOLDER / f"{name}.tsv"]
    more = FOLDER / f"{name}_more.tsv"
    if level == "hard" and more.is_file():
        paths.append(more)
    return tuple(row for path in paths for row in _read_file(kind, path))


def _read_file(kind: type[Row], path: Path) -> list[Row]:
    lists = {name for name, hint in typing.get_type_hints(kind).items() if hint is not str}
    rows = []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        for cells in reader:
            if None in cells or None in cells.values():
                raise ValueError(f"{path}:{reader.line_num} has the wrong number of columns")
            values: dict[str, Any] = {
                name: tuple(cell.split("+")) if cell and name in lists else () if name in lists else cell
                for name, cell in cells.items()
            }
            rows.append(kind(**values))
    return rows


def _only(rows: tuple[Row, ...], en: str) -> Row:
    for row in rows:
        if getattr(row, "en", None) == en:
            return row
    raise KeyError(en)


@cache
def frequency(word: str, skew: float) -> float:
    """1 / (1 + skew u), with u from the word's hash, uniform in [0, 1).

    Of N words the frequencies follow Zipf and Mandelbrot's law, 1 / (N / skew + rank).
    """
    u = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big") / 2**64
    return 1 / (1 + skew * u)
