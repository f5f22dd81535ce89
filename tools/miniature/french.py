"""A clause in French: agreement, elision, contraction, the place of adjectives, the partitive."""

from __future__ import annotations

from tools.miniature.grammar import Clause, NounPhrase, join
from tools.miniature.lexicon import Adjective, Preposition

VOWELS = tuple("aeiouyhâàéèêëîïôöûüœ")
"""What French elides before; an aspirated h is marked in the lexicon."""
FR_CONTRACTED = {"à le": "au", "à les": "aux", "de le": "du", "de les": "des"}


def french(clause: Clause) -> str:
    """The clause in French."""
    time = clause.time.fr if clause.time else ""
    subject = " et ".join(french_phrase(phrase) for phrase in clause.subject)
    if clause.attribute:
        subject += " " + _french_adverbial(clause.attribute)
    past = clause.tense == "past"
    if clause.predicate:
        be = ("étaient" if clause.plural else "était") if past else ("sont" if clause.plural else "est")
        form = _french_adjective(clause.predicate, _french_feminine(clause), clause.plural)
        core = [subject, be, "très" if clause.very else "", form]
    elif clause.verb is None:
        core = ["il y avait" if past else "il y a", subject]
    else:
        core = [subject, _french_verb(clause)]
    core += [french_phrase(clause.object)] if clause.object else []
    core += [_french_contract("à", french_phrase(clause.recipient))] if clause.recipient else []
    core += [_french_adverbial(adverbial) for adverbial in clause.adverbials]
    return join(time if clause.time_first else "", *core, "" if clause.time_first else time)


def french_phrase(phrase: NounPhrase) -> str:
    """A noun phrase with its article, elided where needed; a mass noun without determiner takes the partitive."""
    noun, feminine = phrase.noun, phrase.noun.fr_gender[0] == "f"
    word = noun.fr_plural if phrase.plural else noun.fr
    before = [adjective for adjective in phrase.adjectives if adjective.before == "yes"]
    after = [adjective for adjective in phrase.adjectives if adjective.before != "yes"]
    silent = word.lower().startswith(VOWELS) and not noun.fr_gender.endswith("h")
    forms: list[str] = []
    for adjective in reversed(before):
        forms.insert(0, _french_adjective(adjective, feminine, phrase.plural, silent))
        silent = forms[0].startswith(VOWELS)
    words = join(*forms, word, *(_french_adjective(adjective, feminine, phrase.plural) for adjective in after))
    if noun.is_name:
        return words
    determiner = phrase.determiner
    if determiner is None:
        return f"de l'{words}" if silent else f"de la {words}" if feminine else f"du {words}"
    if phrase.plural:
        return f"{determiner.fr_plural} {words}"
    if silent:
        article = determiner.fr_f_vowel if feminine else determiner.fr_m_vowel
    else:
        article = determiner.fr_f if feminine else determiner.fr_m
    return f"{article}{words}" if article.endswith("'") else f"{article} {words}"


def _french_verb(clause: Clause) -> str:
    verb = clause.verb
    assert verb is not None
    rest = ""
    if clause.modal:
        finite, rest = (clause.modal.fr_plural if clause.plural else clause.modal.fr_third), verb.fr
    elif clause.tense == "past" and verb.fr_aux == "e":
        ending = ("e" if _french_feminine(clause) else "") + ("s" if clause.plural else "")
        finite, rest = ("sont" if clause.plural else "est"), verb.fr_participle + ending
    elif clause.tense == "past":
        finite, rest = ("ont" if clause.plural else "a"), verb.fr_participle
    else:
        finite = verb.fr_plural if clause.plural else verb.fr_third
    if clause.negated:
        finite = f"n'{finite} pas" if finite.startswith(VOWELS) else f"ne {finite} pas"
    return join(finite, rest)


def _french_adjective(adjective: Adjective, feminine: bool, plural: bool, before_vowel: bool = False) -> str:
    if plural:
        return adjective.fr_fp if feminine else adjective.fr_mp
    if feminine:
        return adjective.fr_f
    return adjective.fr_vowel if before_vowel else adjective.fr_m


def _french_feminine(clause: Clause) -> bool:
    return all(phrase.noun.fr_gender[0] == "f" for phrase in clause.subject)


def _french_adverbial(adverbial: tuple[Preposition, NounPhrase]) -> str:
    return _french_contract(adverbial[0].fr, french_phrase(adverbial[1]))


def _french_contract(preposition: str, phrase: str) -> str:
    *head, last = preposition.split()
    first, _, rest = phrase.partition(" ")
    if last == "de" and first[0].lower() in VOWELS:
        return join(*head, f"d'{phrase}")
    return join(*head, FR_CONTRACTED.get(f"{last} {first}", f"{last} {first}"), rest)
