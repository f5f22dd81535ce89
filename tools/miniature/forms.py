"""Every word that a sentence of the miniature world can hold, by language: for telling which one an answer is in.

The words come from the grammar itself: clauses that between them use each noun, adjective, verb, time and preposition
in each form are realised in the three languages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product

from sm_train.scoring.language import words
from tools.miniature.french import VOWELS, french
from tools.miniature.german import german
from tools.miniature.grammar import Clause, NounPhrase, english
from tools.miniature.lexicon import Adjective, Determiner, Lexicon, Noun

LANGUAGES = {"de": german, "en": english, "fr": french}


def word_forms(lexicon: Lexicon) -> dict[str, list[str]]:
    """The words by language, sorted."""
    clauses = list(_clauses(lexicon))
    return {
        language: sorted({word for clause in clauses for word in words(realise(clause))})
        for language, realise in LANGUAGES.items()
    }


def _clauses(lexicon: Lexicon) -> Iterator[Clause]:
    subjects = [
        NounPhrase(noun, lexicon.determiners["the"], plural=plural)
        for noun, plural in product(_one_of_each_shape(lexicon.nouns), (False, True))
        if _is_countable(noun)
    ]
    names = [NounPhrase(noun) for noun in lexicon.nouns if noun.is_name]
    someone, other = subjects[0], names[0]
    giving = next(verb for verb in lexicon.verbs if verb.frame == "giving")
    # A phrase is a subject, a recipient and an object: nominative, dative and accusative.
    for phrase in (*_plain(lexicon), *_described(lexicon)):
        yield Clause((phrase,), giving, recipient=phrase, object=phrase)
    for phrase, preposition in product(subjects, lexicon.prepositions.values()):
        yield Clause((someone,), giving, adverbials=((preposition, phrase),))
    for phrase, adjective, tense in product((*subjects, *names), lexicon.adjectives, ("present", "past")):
        yield Clause((phrase,), None, tense, predicate=adjective, very=True)
    for phrase, tense in product(subjects, ("present", "past")):
        yield Clause((phrase,), None, tense)
    modals = [verb for verb in lexicon.verbs if verb.frame == "modal"]
    for phrase, verb in product((*subjects, *names), lexicon.verbs):
        if verb.frame == "modal":
            continue
        for tense, negated in product(("present", "past"), (False, True)):
            yield Clause((phrase,), verb, tense, negated=negated)
        for modal in modals:
            yield Clause((phrase,), verb, "modal", modal)
    for time in lexicon.times:
        yield Clause((someone, other), giving, time=time)


def _plain(lexicon: Lexicon) -> Iterator[NounPhrase]:
    """Every noun with every determiner that it goes with."""
    for noun in lexicon.nouns:
        if noun.is_name or noun.is_mass:
            yield NounPhrase(noun)
        for determiner, plural in _determined(lexicon.determiners.values(), noun):
            yield NounPhrase(noun, determiner, plural=plural)


def _described(lexicon: Lexicon) -> Iterator[NounPhrase]:
    """Every adjective in every form, by nouns of each shape that it goes with."""
    for adjective in lexicon.adjectives:
        for noun in _one_of_each_shape(noun for noun in lexicon.nouns if _fits(adjective, noun)):
            if noun.is_mass:
                yield NounPhrase(noun, None, (adjective,))
            for determiner, plural in _determined(lexicon.determiners.values(), noun):
                yield NounPhrase(noun, determiner, (adjective,), plural)


def _fits(adjective: Adjective, noun: Noun) -> bool:
    return noun.kind in adjective.kinds and not noun.is_name


def _determined(determiners: Iterable[Determiner], noun: Noun) -> Iterator[tuple[Determiner, bool]]:
    """(determiner, plural) of each combination that is grammatical."""
    if noun.is_name:
        return
    for determiner in determiners:
        if determiner.number in ("singular", "any"):
            yield determiner, False
        if determiner.number in ("plural", "any") and _is_countable(noun):
            yield determiner, True


def _is_countable(noun: Noun) -> bool:
    return not noun.is_mass and not noun.is_name


def _one_of_each_shape(nouns: Iterable[Noun]) -> list[Noun]:
    """The first noun of each that behave alike: gender in both languages, a vowel in French, countable or not."""
    shapes: dict[tuple[object, ...], Noun] = {}
    for noun in nouns:
        shape = (noun.fr_gender, noun.fr.lower().startswith(VOWELS), noun.de_gender, _is_countable(noun))
        shapes.setdefault(shape, noun)
    return list(shapes.values())
