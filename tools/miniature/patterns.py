"""The sentence patterns of the miniature world: each draws one clause.

Every draw comes from one ``numpy.random.Generator``; the lexicon says which noun can do what to which.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TypeVar

import numpy as np

from tools.miniature.grammar import Clause, NounPhrase
from tools.miniature.lexicon import Adjective, Lexicon, Noun, Preposition, Time, Verb, frequency

Item = TypeVar("Item")
Word = TypeVar("Word", Noun, Adjective, Verb, Time)
LIVING = ("person", "animal")
OBJECTS = (*LIVING, "tool", "glass", "clothes", "vehicle", "furniture", "opening", "fruit", "place")
SINGULAR = ("the", "the", "the", "a", "a", "my", "our", "this")
DEFINITE = ("the", "the", "my", "our", "this")
PLURAL = ("the", "these", "my", "our", *("two", "three", "four", "five", "six", "seven", "nine", "ten"))


class Drawer:
    """Draws words that fit together, no noun twice; ``detail`` and ``skew`` as in WorldConfig."""

    def __init__(self, lexicon: Lexicon, rng: np.random.Generator, detail: float, skew: float = 0.0) -> None:
        self.lexicon = lexicon
        self._rng = rng
        self._detail, self._skew = detail, skew
        self._used: set[str] = set()

    def chance(self, share: float) -> bool:
        """True with this probability."""
        return bool(self._rng.random() < share)

    def optional(self, share: float) -> bool:
        """True with this probability, scaled by ``detail``."""
        return self.chance(min(1.0, share * self._detail))

    def one(self, items: Sequence[Item]) -> Item:
        """One of the items, all equally likely."""
        return items[int(self._rng.integers(len(items)))]

    def word(self, items: Sequence[Word]) -> Word:
        """One of the items, each as likely as its frequency says."""
        if not self._skew:
            return self.one(items)
        bounds = list(accumulate(frequency(item.en, self._skew) for item in items))
        return items[bisect(bounds, self._rng.random() * bounds[-1])]

    def verb(self, frame: str, subject: str = "") -> Verb:
        """A verb of a frame that a noun of kind ``subject`` can be the subject of."""
        return self.word([v for v in self.lexicon.verbs if v.frame == frame and (not subject or subject in v.subjects)])

    def noun(self, kinds: Sequence[str]) -> Noun:
        """A noun of one of the kinds, not used yet in this sentence."""
        noun = self.word([noun for noun in self.lexicon.nouns if noun.kind in kinds and noun.en not in self._used])
        self._used.add(noun.en)
        return noun

    def phrase(self, kinds: Sequence[str], plural: bool | None = None, determiners: Sequence[str] = ()) -> NounPhrase:
        """A noun phrase; ``plural`` None leaves the number to chance, which never fixes ``determiners``."""
        if "person" in kinds and plural is None and not determiners and self.chance(0.15):
            return NounPhrase(self.noun(["name"]))
        noun = self.noun(kinds)
        if noun.is_mass:
            return NounPhrase(
                noun, self.lexicon.determiners["the"] if self.chance(0.3) else None, self.adjectives(noun)
            )
        if plural is None:
            plural = not determiners and self.chance(0.3)
        determiner = self.one(determiners or (PLURAL if plural else SINGULAR))
        adjectives = self.adjectives(noun, at_most=1 if determiner in PLURAL[4:] else 2)
        return NounPhrase(noun, self.lexicon.determiners[determiner], adjectives, plural)

    def adjectives(self, noun: Noun, at_most: int = 2) -> tuple[Adjective, ...]:
        """None, one or two adjectives; of two the first is one that French puts before the noun."""
        fitting = [adjective for adjective in self.lexicon.adjectives if noun.kind in adjective.kinds]
        colours = [adjective for adjective in fitting if adjective.group == "colour"]
        qualities = [adjective for adjective in fitting if adjective.group == "quality"]
        colour = [self.word(colours)] if colours and self.optional(0.35) else []
        if not qualities or not self.optional(0.4) or (colour and at_most == 1):
            return tuple(colour)
        if colour:
            qualities = [adjective for adjective in qualities if adjective.before == "yes"]
        return (*([self.word(qualities)] if qualities else []), *colour)

    def place(self) -> tuple[Preposition, NounPhrase]:
        """Where something is: "behind our house"."""
        noun = self.word([noun for noun in self.lexicon.nouns if noun.places and noun.en not in self._used])
        return self._at(noun, self.one([name for name in noun.places if name != "to"]))

    def destination(self) -> tuple[Preposition, NounPhrase]:
        """Where somebody goes: "to the park"."""
        return self._at(self.word([noun for noun in self.lexicon.nouns if "to" in noun.places]), "to")

    def company(self, kinds: Sequence[str] = LIVING) -> tuple[Preposition, NounPhrase]:
        """With or without whom."""
        preposition = self.lexicon.prepositions[self.one(("with", "with", "without"))]
        phrase = self.phrase(kinds)
        return preposition, replace(phrase, adjectives=phrase.adjectives[:1])

    def time(self, tense: str) -> Time:
        """When, in this tense."""
        return self.word([time for time in self.lexicon.times if tense in time.tenses])

    def modal(self) -> Verb:
        return self.verb("modal")

    def _at(self, noun: Noun, preposition: str) -> tuple[Preposition, NounPhrase]:
        self._used.add(noun.en)
        determiner = self.one(("the", "the", "the", "my", "our", "this"))
        return self.lexicon.prepositions[preposition], NounPhrase(noun, self.lexicon.determiners[determiner])


def _transitive(draw: Drawer, subject: NounPhrase, definite: bool = False) -> Clause:
    kind = "person" if subject.noun.is_name else subject.noun.kind
    verb = draw.verb("object", kind)
    return Clause((subject,), verb, object=draw.phrase(verb.objects, determiners=DEFINITE if definite else ()))


def _when(draw: Drawer, tense: str, share: float = 0.4) -> Time | None:
    return draw.time(tense) if draw.optional(share) else None


def _object(draw: Drawer) -> Clause:
    return replace(_transitive(draw, draw.phrase(LIVING)), time=_when(draw, "present"))


def _place(draw: Drawer) -> Clause:
    subject = draw.phrase(LIVING)
    tense = draw.one(("present", "present", "past"))
    kind = "person" if subject.noun.is_name else subject.noun.kind
    return Clause((subject,), draw.verb("none", kind), tense, adverbials=(draw.place(),), time=_when(draw, tense))


def _counting(draw: Drawer) -> Clause:
    subject = draw.phrase(LIVING, plural=True, determiners=PLURAL[4:])
    if draw.chance(0.5):
        return _transitive(draw, subject)
    return Clause((subject,), draw.verb("none", subject.noun.kind), adverbials=(draw.place(),))


def _modal(draw: Drawer) -> Clause:
    clause = _transitive(draw, draw.phrase(["person"]))
    return replace(clause, tense="modal", modal=draw.modal(), time=_when(draw, "modal"))


def _past(draw: Drawer) -> Clause:
    return replace(_transitive(draw, draw.phrase(LIVING)), tense="past", time=_when(draw, "past", 0.6))


def _topic(draw: Drawer) -> Clause:
    clause = draw.one((_transitive_person, _motion))(draw)
    tense = draw.one(("present", "past", "modal"))
    modal = draw.modal() if tense == "modal" else None
    return replace(clause, tense=tense, modal=modal, time=draw.time(tense), time_first=True)


def _transitive_person(draw: Drawer) -> Clause:
    return _transitive(draw, draw.phrase(["person"]))


def _giving(draw: Drawer) -> Clause:
    subject, verb = draw.phrase(["person"]), draw.verb("giving")
    thing = draw.phrase(verb.objects)
    recipient = draw.phrase(["person"], plural=False if draw.chance(0.6) else None)
    tense = draw.one(("present", "past", "modal"))
    modal = draw.modal() if tense == "modal" else None
    recipient = replace(recipient, adjectives=recipient.adjectives[:1])
    return Clause((subject,), verb, tense, modal, recipient=recipient, object=thing, time=_when(draw, tense, 0.2))


def _being(draw: Drawer) -> Clause:
    subject = draw.phrase(OBJECTS, determiners=DEFINITE if draw.chance(0.6) else ())
    kind = "person" if subject.noun.is_name else subject.noun.kind
    fitting = [adjective for adjective in draw.lexicon.adjectives if kind in adjective.kinds]
    predicate = draw.one(fitting)
    kept = tuple(adjective for adjective in subject.adjectives if adjective.group != predicate.group)
    subject = replace(subject, adjectives=kept)
    attribute = draw.place() if draw.optional(0.5) and not subject.noun.is_name else None
    very = predicate.group == "quality" and draw.chance(0.5)
    tense = draw.one(("present", "present", "past"))
    return Clause((subject,), None, tense, predicate=predicate, very=very, attribute=attribute)


def _existence(draw: Drawer) -> Clause:
    plural = draw.chance(0.5)
    subject = draw.phrase(OBJECTS, plural, determiners=PLURAL[4:] if plural else ("a",))
    return Clause((subject,), None, draw.one(("present", "past")), adverbials=(draw.place(),))


def _motion(draw: Drawer) -> Clause:
    subject = draw.phrase(LIVING)
    tense = draw.one(("present", "past"))
    adverbials = (draw.company(), draw.destination()) if draw.optional(0.25) else (draw.destination(),)
    return Clause((subject,), draw.verb("motion"), tense, adverbials=adverbials, time=_when(draw, tense))


def _company(draw: Drawer) -> Clause:
    subject = draw.phrase(["person"])
    tense = draw.one(("present", "past", "modal"))
    modal = draw.modal() if tense == "modal" else None
    adverbials = (draw.company(), draw.place()) if draw.optional(0.5) else (draw.company(),)
    return Clause((subject,), draw.verb("none", "person"), tense, modal, adverbials=adverbials)


def _negation(draw: Drawer) -> Clause:
    tense = draw.one(("present", "past"))
    clause = _motion(draw) if draw.chance(0.3) else _transitive(draw, draw.phrase(LIVING), definite=True)
    return replace(clause, tense=tense, negated=True, time=None)


def _together(draw: Drawer) -> Clause:
    names = draw.chance(0.3)
    determiners = () if names else ("the", "my", "our")
    kinds = ["name"] if names else ["person"]
    one, other = (
        NounPhrase(draw.noun(kinds), None if names else draw.lexicon.determiners[draw.one(determiners)])
        for _ in range(2)
    )
    if draw.chance(0.5):
        clause = _transitive(draw, one)
    else:
        clause = Clause((one,), draw.verb("none", "person"), adverbials=(draw.place(),))
    tense = draw.one(("present", "past"))
    return replace(clause, subject=(one, other), tense=tense, time=_when(draw, tense, 0.25))


PATTERNS: dict[str, Callable[[Drawer], Clause]] = {
    "object": _object,
    "place": _place,
    "counting": _counting,
    "modal": _modal,
    "past": _past,
    "topic": _topic,
    "giving": _giving,
    "being": _being,
    "existence": _existence,
    "motion": _motion,
    "company": _company,
    "negation": _negation,
    "together": _together,
}
