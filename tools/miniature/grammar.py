"""What a sentence says, as words and roles in no language, and its English form.

``french.py`` and ``german.py`` realise the same :class:`Clause`. English is lower-case without punctuation, as the text
of the speech is; French and German are written properly, but start in lower case and have no full stop.
"""

from __future__ import annotations

from dataclasses import dataclass

from tools.miniature.lexicon import Adjective, Determiner, Noun, Preposition, Time, Verb


@dataclass(frozen=True, slots=True)
class NounPhrase:
    """Determiner, adjectives in English order, noun."""

    noun: Noun
    determiner: Determiner | None = None
    """None for names and for mass nouns ("cold water")."""
    adjectives: tuple[Adjective, ...] = ()
    plural: bool = False


@dataclass(frozen=True, slots=True)
class Clause:
    """What is said. Without a verb it is being (there is a ``predicate``) or existence (there is none)."""

    subject: tuple[NounPhrase, ...]
    """One phrase, or two joined by "and"."""
    verb: Verb | None = None
    tense: str = "present"
    """present | past | modal"""
    modal: Verb | None = None
    negated: bool = False
    predicate: Adjective | None = None
    very: bool = False
    recipient: NounPhrase | None = None
    object: NounPhrase | None = None
    adverbials: tuple[tuple[Preposition, NounPhrase], ...] = ()
    attribute: tuple[Preposition, NounPhrase] | None = None
    """A place that belongs to the subject: "the tree behind the house"."""
    time: Time | None = None
    time_first: bool = False

    @property
    def plural(self) -> bool:
        return len(self.subject) > 1 or self.subject[0].plural


def english(clause: Clause) -> str:
    """The clause in English."""
    time = clause.time.en if clause.time else ""
    subject = " and ".join(english_phrase(phrase) for phrase in clause.subject)
    if clause.attribute:
        subject += " " + english_adverbial(clause.attribute)
    be = ("were" if clause.plural else "was") if clause.tense == "past" else ("are" if clause.plural else "is")
    if clause.predicate:
        core = [subject, be, "very" if clause.very else "", clause.predicate.en]
    elif clause.verb is None:
        core = ["there", be, subject]
    else:
        core = [subject, english_verb(clause)]
    core += [english_phrase(clause.object)] if clause.object else []
    core += ["to", english_phrase(clause.recipient)] if clause.recipient else []
    core += [english_adverbial(adverbial) for adverbial in clause.adverbials]
    return join(time if clause.time_first else "", *core, "" if clause.time_first else time)


def english_verb(clause: Clause) -> str:
    """The verb group: "buys", "bought", "does not buy", "wants to buy"."""
    assert clause.verb is not None
    if clause.modal:
        return f"{clause.modal.en if clause.plural else clause.modal.en_third} {clause.verb.en}"
    if clause.negated:
        do = "did" if clause.tense == "past" else "do" if clause.plural else "does"
        return f"{do} not {clause.verb.en}"
    if clause.tense == "past":
        return clause.verb.en_past
    return clause.verb.en if clause.plural else clause.verb.en_third


def english_phrase(phrase: NounPhrase, bare: bool = False) -> str:
    """A noun phrase; ``bare`` leaves an article, demonstrative or possessive out, but not a number."""
    words = [
        *(adjective.en for adjective in phrase.adjectives),
        phrase.noun.en_plural if phrase.plural else phrase.noun.en,
    ]
    determiner = phrase.determiner
    if determiner is None or (bare and determiner.declension != "bare"):
        return join(*words)
    article = "an" if determiner.en == "a" and words[0][0] in "aeiou" else determiner.en
    return join(article, *words)


def english_adverbial(adverbial: tuple[Preposition, NounPhrase]) -> str:
    """A preposition and its phrase."""
    return f"{adverbial[0].en} {english_phrase(adverbial[1])}"


def join(*words: str) -> str:
    """The words that are not empty, with single spaces."""
    return " ".join(word for word in words if word)
