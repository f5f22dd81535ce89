"""Questions about a clause and their answers of one to three English words."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tools.miniature.grammar import Clause, NounPhrase, english_adverbial, english_phrase, english_verb, join

KINDS = ("who", "what", "whom", "company", "where", "when", "colour", "kind", "number", "state", "action")
MAX_ANSWER_WORDS = 3


@dataclass(frozen=True)
class Question:
    """Lower-case and without punctuation, like the sentences."""

    kind: str
    question: str
    answer: str


def about(clause: Clause) -> tuple[Question, ...]:
    """Every question whose answer the clause gives; all answers are words of the sentence, in its order."""
    found = [*_roles(clause), *_circumstances(clause)]
    for phrase in _phrases(clause):
        found += _properties(phrase)
    return tuple(question for question in found if len(question.answer.split()) <= MAX_ANSWER_WORDS)


def _roles(clause: Clause) -> list[Question]:
    subject = " and ".join(english_phrase(phrase, bare=True) for phrase in clause.subject)
    if clause.verb is None:
        if clause.predicate is None:
            return [Question("what", f"what {_be(clause)} there", subject)]
        state = f"very {clause.predicate.en}" if clause.very else clause.predicate.en
        if clause.predicate.group == "colour":
            return [Question("colour", f"what colour {_be(clause)} {_named(clause)}", clause.predicate.en)]
        return [Question("state", f"how {_be(clause)} {_named(clause)}", state)]
    found = []
    if clause.object:
        thing = english_phrase(clause.object, bare=True)
        found.append(Question("what", _ask("what", clause, with_object=False), thing))
    elif not clause.negated:
        found.append(
            Question("action", _ask("what", clause, do=True), clause.verb.en if clause.modal else english_verb(clause))
        )
    found.append(Question("who", join("who", _singular_verb(clause), _reference(clause.object)), subject))
    if clause.recipient:
        found.append(Question("whom", _ask("to whom", clause), english_phrase(clause.recipient, bare=True)))
    return found


def _circumstances(clause: Clause) -> list[Question]:
    found = []
    for preposition, phrase in clause.adverbials:
        if preposition.en in ("with", "without"):
            whom = english_phrase(phrase, bare=True)
            found.append(Question("company", _ask(f"{preposition.en} whom", clause), whom))
        elif clause.verb is None:
            found.append(
                Question("where", f"where {_be(clause)} {_named(clause)}", english_adverbial((preposition, phrase)))
            )
        else:
            found.append(Question("where", _ask("where", clause), english_adverbial((preposition, phrase))))
    if clause.attribute:
        found.append(Question("where", f"where {_be(clause)} {_named(clause)}", english_adverbial(clause.attribute)))
    if clause.time and clause.verb:
        found.append(Question("when", _ask("when", clause), clause.time.en))
    return found


def _properties(phrase: NounPhrase) -> list[Question]:
    """Colour, kind and number, of a noun that comes once in its sentence."""
    noun = phrase.noun.en_plural if phrase.plural else phrase.noun.en
    found = []
    for adjective in phrase.adjectives:
        if adjective.group == "colour":
            found.append(Question("colour", f"what colour {'are' if phrase.plural else 'is'} the {noun}", adjective.en))
        else:
            found.append(Question("kind", f"what kind of {noun}", adjective.en))
    if phrase.determiner and phrase.determiner.declension == "bare":
        found.append(Question("number", f"how many {noun}", phrase.determiner.en))
    return found


def _phrases(clause: Clause) -> list[NounPhrase]:
    single = [phrase for phrase in (clause.recipient, clause.object) if phrase]
    return [*clause.subject, *single, *(phrase for _, phrase in clause.adverbials)]


def _ask(word: str, clause: Clause, with_object: bool = True, do: bool = False) -> str:
    """ "when does the farmer want to buy the car": question word, auxiliary, subject, verb, object."""
    assert clause.verb is not None
    verb = "do" if do else clause.verb.en
    if clause.modal and clause.modal.en != clause.modal.en_third:
        verb = f"{clause.modal.en} {verb}"
    if clause.modal and clause.modal.en == clause.modal.en_third:
        auxiliary = clause.modal.en
    else:
        auxiliary = "did" if clause.tense == "past" else "do" if clause.plural else "does"
    negation = "not" if clause.negated else ""
    return join(word, auxiliary, _named(clause), negation, verb, _reference(clause.object) if with_object else "")


def _named(clause: Clause) -> str:
    return " and ".join(_reference(phrase) for phrase in clause.subject)


def _reference(phrase: NounPhrase | None) -> str:
    if phrase is None:
        return ""
    if phrase.noun.is_name or (phrase.noun.is_mass and phrase.determiner is None):
        return phrase.noun.en
    return f"the {phrase.noun.en_plural if phrase.plural else phrase.noun.en}"


def _singular_verb(clause: Clause) -> str:
    """The verb as "who" takes it: "who buys", also when two do."""
    return english_verb(replace(clause, subject=(replace(clause.subject[0], plural=False),)))


def _be(clause: Clause) -> str:
    return ("were" if clause.plural else "was") if clause.tense == "past" else ("are" if clause.plural else "is")
