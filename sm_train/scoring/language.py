"""The language that an answer is in, by a library's model or by lists of words.

The library is py3langid: a 4.6 MB wheel (BSD) that needs NumPy alone and works offline; it reads its model, which the
wheel carries, with ``allow_pickle=False``. Lists of words suit a small closed world and languages it does not know.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from sm_train import config, files
from sm_train.errors import UserError

_WORD = re.compile(r"[^\W\d_]+")


class Languages(Protocol):
    """Tells languages apart."""

    signature: str
    """What it was, for the metric's signature."""

    def of(self, text: str) -> frozenset[str]:
        """The language of a text; more than one where they tie, none where nothing tells."""


class Library:
    """py3langid, restricted to some languages."""

    def __init__(self, among: Iterable[str]) -> None:
        """Raises UserError for a language that it does not know."""
        codes = sorted({_primary(code) for code in among})
        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
        if unknown := sorted(set(codes) - set(self._identifier.labels)):
            raise UserError(f"py3langid does not know the language {unknown[0]!r}; set lexicon to a file of its words")
        self._identifier.set_languages(codes)
        self.signature = f"py3langid:{version('py3langid')}|among:{','.join(codes)}"

    def of(self, text: str) -> frozenset[str]:
        ranked = self._identifier.rank(text)
        # A text without one feature that the model knows has the same score in every language; digits are features.
        tells = bool(words(text)) and ranked[0][1] > ranked[-1][1]
        return frozenset({ranked[0][0]} if tells else ())


class Lexicon:
    """Lists of words: a text is in the language whose list knows the most of its words."""

    def __init__(self, lists: Mapping[str, Sequence[str]]) -> None:
        self._known = {
            _primary(code): {word for text in texts for word in words(text)} for code, texts in lists.items()
        }
        self.signature = f"lexicon:{config.fingerprint({code: sorted(known) for code, known in self._known.items()})}"

    def of(self, text: str) -> frozenset[str]:
        said = words(text)
        counts = {code: sum(word in known for word in said) for code, known in self._known.items()}
        most = max(counts.values(), default=0)
        return frozenset(code for code, count in counts.items() if count == most > 0)


def open_languages(lexicon: str | None, asked: Iterable[str], others: Iterable[str] = ()) -> Languages:
    """What tells the languages of answers: the word lists in a file, or else the library.

    Args:
        lexicon: a JSON file ``{"en": [words], "fr": [words]}``.
        asked: the languages that answers are asked for in.
        others: further languages that the library considers.

    Raises:
        UserError: the file is missing or no such lists, or a language that is asked for is unknown.
    """
    if lexicon is None:
        return Library({*asked, *others})
    lists = files.read_json(Path(lexicon))
    if not isinstance(lists, dict) or not all(_is_list_of_words(texts) for texts in lists.values()):
        raise UserError(f"lexicon {lexicon} must map languages to lists of words, as in {{'fr': ['le', 'la']}}")
    if missing := sorted({_primary(code) for code in asked} - {_primary(code) for code in lists}):
        raise UserError(
            f"lexicon {lexicon} has no words of {missing[0]!r}, which is asked for; it has {', '.join(lists) or 'none'}"
        )
    return Lexicon(lists)


def is_in(languages: Languages, text: str, asked: str) -> bool:
    """Whether a text is in the language asked for; a tie counts for it."""
    return _primary(asked) in languages.of(text)


def words(text: str) -> list[str]:
    """The words as they are looked up: letters alone, in lower case, composed; l'été is two."""
    return _WORD.findall(unicodedata.normalize("NFC", text).lower())


def _primary(code: str) -> str:
    """The language of a code with a region or script: "pt" of "pt-BR"."""
    return re.split("[-_]", code)[0].lower()


def _is_list_of_words(texts: object) -> bool:
    return isinstance(texts, list) and bool(texts) and all(isinstance(text, str) for text in texts)
