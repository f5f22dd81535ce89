"""A clause in German: cases, adjective endings, contraction, the finite verb second and the rest of the verb last."""

from __future__ import annotations

from tools.miniature.grammar import Clause, NounPhrase, join
from tools.miniature.lexicon import Preposition

DE_THE = {  # case -> article for m, f, n, plural
    "nominative": ("der", "die", "das", "die"),
    "accusative": ("den", "die", "das", "die"),
    "dative": ("dem", "der", "dem", "den"),
}
DE_DIES = {
    "nominative": ("er", "e", "es", "e"),
    "accusative": ("en", "e", "es", "e"),
    "dative": ("em", "er", "em", "en"),
}
DE_EIN = {
    "nominative": ("", "e", "", "e"),
    "accusative": ("en", "e", "", "e"),
    "dative": ("em", "er", "em", "en"),
}
DE_ADJECTIVE = {  # what stands before the adjective -> case -> ending for m, f, n, plural
    "definite": {
        "nominative": ("e", "e", "e", "en"),
        "accusative": ("en", "e", "e", "en"),
        "dative": ("en", "en", "en", "en"),
    },
    "indefinite": {
        "nominative": ("er", "e", "es", "en"),
        "accusative": ("en", "e", "es", "en"),
        "dative": ("en", "en", "en", "en"),
    },
    "bare": DE_DIES,
}
DE_CONTRACTED = {"in dem": "im", "zu dem": "zum", "zu der": "zur", "an dem": "am", "bei dem": "beim", "von dem": "vom"}


def german(clause: Clause) -> str:
    """The clause in German: the finite verb second, infinitive, participle or separable prefix last."""
    time = clause.time.de if clause.time else ""
    case = "nominative" if clause.verb or clause.predicate else "accusative"
    subject = " und ".join(german_phrase(phrase, case) for phrase in clause.subject)
    if clause.attribute:
        subject += " " + _german_adverbial(clause.attribute)
    finite, last = _german_verb(clause)
    if clause.predicate is None and clause.verb is None:
        first, middle = "es", [subject]
    elif clause.time_first:
        first, middle = time, [subject]
    else:
        first, middle = subject, [time]
    middle += [german_phrase(clause.recipient, "dative")] if clause.recipient else []
    middle += [german_phrase(clause.object, "accusative")] if clause.object else []
    middle += ["nicht" if clause.negated else ""]
    middle += [_german_adverbial(adverbial) for adverbial in clause.adverbials]
    return join(
        first, finite, *middle, "sehr" if clause.very else "", clause.predicate.de if clause.predicate else "", last
    )


def german_phrase(phrase: NounPhrase, case: str) -> str:
    """A noun phrase in a case: nominative, accusative or dative."""
    noun = phrase.noun
    if noun.is_name:
        return noun.de
    slot = 3 if phrase.plural else "mfn".index(noun.de_gender[0])
    determiner = phrase.determiner
    declension = determiner.declension if determiner else "bare"
    article = ""
    if determiner:
        ending = {"definite": DE_DIES, "indefinite": DE_EIN, "bare": None}[declension]
        article = DE_THE[case][slot] if determiner.de == "d" else determiner.de + (ending[case][slot] if ending else "")
    ending_of_adjective = DE_ADJECTIVE[declension][case][slot]
    adjectives = [adjective.de_stem + ending_of_adjective for adjective in phrase.adjectives]
    word = noun.de
    if phrase.plural:
        word = noun.de_plural + ("n" if case == "dative" and not noun.de_plural.endswith(("n", "s")) else "")
    elif noun.de_gender.endswith("w") and case != "nominative":
        word = noun.de_plural
    return join(article, *adjectives, word)


def _german_verb(clause: Clause) -> tuple[str, str]:
    verb, plural, past = clause.verb, clause.plural, clause.tense == "past"
    if clause.predicate:
        return (("waren" if plural else "war") if past else ("sind" if plural else "ist")), ""
    if verb is None:
        return ("gab" if past else "gibt"), ""
    if clause.modal:
        return (clause.modal.de if plural else clause.modal.de_third), verb.de
    if past and verb.de_aux == "s":
        return ("sind" if plural else "ist"), verb.de_participle
    if past:
        return ("haben" if plural else "hat"), verb.de_participle
    return (verb.de.removeprefix(verb.de_prefix) if plural else verb.de_third), verb.de_prefix


def _german_adverbial(adverbial: tuple[Preposition, NounPhrase]) -> str:
    preposition, phrase = adverbial
    first, _, rest = german_phrase(phrase, preposition.de_case).partition(" ")
    return join(DE_CONTRACTED.get(f"{preposition.de} {first}", f"{preposition.de} {first}"), rest)
