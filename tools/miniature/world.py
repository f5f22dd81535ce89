"""The miniature world: random sentences with true French and German translations, questions and answers.

A sentence belongs to one split by the hash of its text alone, so that no two draws of any generator, whatever its seed
or purpose, share a sentence between splits.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from sm_train.config import key
from tools.miniature import lexicon
from tools.miniature.french import french
from tools.miniature.german import german
from tools.miniature.grammar import english
from tools.miniature.patterns import PATTERNS, Drawer
from tools.miniature.questions import Question, about

__all__ = ["Question", "Sentence", "World", "WorldConfig", "split_of"]

SPLITS = ("train", "valid", "test")
MAX_DRAWS = 100_000


@dataclass(frozen=True)
class WorldConfig:
    """Which words and sentences there are."""

    level: str = key("easy", "lexicon: easy, or hard (adds the words of lexicon/*_more.tsv)")
    patterns: list[str] = key(list(PATTERNS), "sentence patterns to draw from, all equally likely")
    detail: float = key(1.0, "scales the chance of optional adjectives, times and places; above 1 for longer sentences")
    skew: float = key(
        0.0, "how uneven the words' frequencies are, the commonest at most 1 + skew times the rarest's; 0: even"
    )
    min_words: int = key(4, "fewest words of a sentence")
    max_words: int = key(13, "most words of a sentence")

    def __post_init__(self) -> None:
        if self.level not in lexicon.LEVELS:
            raise ValueError(f"key 'level' is {self.level!r}; choose one of {', '.join(lexicon.LEVELS)}")
        unknown = sorted(set(self.patterns) - set(PATTERNS))
        if unknown or not self.patterns:
            raise ValueError(f"key 'patterns' is {self.patterns}; choose some of {', '.join(PATTERNS)}")
        for name in ("detail", "skew"):
            if getattr(self, name) < 0:
                raise ValueError(f"key {name!r} is {getattr(self, name)}; give 0 or more")
        if not 4 <= self.min_words <= 6 or self.max_words < 8:
            raise ValueError(
                f"keys 'min_words' and 'max_words' are {self.min_words} and {self.max_words}; "
                "give min_words from 4 to 6 and max_words of 8 or more"
            )


@dataclass(frozen=True)
class Sentence:
    """One English sentence with everything that is asked about it."""

    text: str
    """Lower-case words separated by single spaces: what is spoken."""
    french: str
    german: str
    questions: tuple[Question, ...]
    """At least one."""
    pattern: str


@dataclass
class World:
    """Draws sentences; holds no random state."""

    config: WorldConfig
    _lexicon: lexicon.Lexicon = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._lexicon = lexicon.read(self.config.level)

    def sample(self, rng: np.random.Generator, split: str) -> Sentence:
        """A random sentence of a split (train, valid or test).

        Raises:
            ValueError: there is no such split.
        """
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is unknown; choose one of {', '.join(SPLITS)}")
        for _ in range(MAX_DRAWS):
            pattern = self.config.patterns[int(rng.integers(len(self.config.patterns)))]
            clause = PATTERNS[pattern](Drawer(self._lexicon, rng, self.config.detail, self.config.skew))
            text = english(clause)
            length = text.count(" ") + 1
            if self.config.min_words <= length <= self.config.max_words and split_of(text) == split:
                return Sentence(text, french(clause), german(clause), about(clause), pattern)
        raise RuntimeError(f"no sentence of split {split!r} in {MAX_DRAWS} draws: a fault of the generator")

    def word_types(self) -> set[str]:
        """Every English word that a sentence can hold."""
        words: set[str] = {"and", "an", "there", "very", "not", "do", "does", "did", "is", "are", "was", "were"}
        for noun in self._lexicon.nouns:
            words |= {noun.en, noun.en_plural}
        for verb in self._lexicon.verbs:
            words |= {*verb.en.split(), *verb.en_third.split(), verb.en_past}
        for rows in (self._lexicon.adjectives, self._lexicon.times):
            for row in rows:
                words |= set(row.en.split())
        words |= set(self._lexicon.prepositions) | set(self._lexicon.determiners)
        return words - {"-"}


def split_of(text: str) -> str:
    """The split of a sentence, a pure function of its text: 90% train, 5% valid, 5% test."""
    point = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % 100
    return "train" if point < 90 else "valid" if point < 95 else "test"
