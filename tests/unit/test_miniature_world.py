"""The miniature world: its grammar against sentences checked by hand, its splits, its questions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from sm_train.config import from_mapping
from sm_train.errors import UserError
from tools.miniature import lexicon
from tools.miniature.french import french
from tools.miniature.german import german
from tools.miniature.grammar import Clause, NounPhrase, english
from tools.miniature.lexicon import Preposition
from tools.miniature.patterns import PATTERNS
from tools.miniature.questions import KINDS, about
from tools.miniature.world import Sentence, World, WorldConfig, split_of

WORDS = lexicon.read("hard")
"""The easy level's words come first."""


def phrase(words: str, plural: bool = False) -> NounPhrase:
    """ "the old horse", with ``plural`` "three old horse" (the noun stays singular)."""
    *rest, noun = words.split()
    determiner = WORDS.determiners.get(rest[0]) if rest else None
    adjectives = tuple(WORDS.adjective(word) for word in rest[1 if determiner else 0 :])
    return NounPhrase(WORDS.noun(noun), determiner, adjectives, plural)


def at(preposition: str, words: str, plural: bool = False) -> tuple[Preposition, NounPhrase]:
    return WORDS.prepositions[preposition], phrase(words, plural)


def clause(subject: NounPhrase, verb: str = "", **rest: object) -> Clause:
    return Clause((subject,), WORDS.verb(verb) if verb else None, **rest)  # type: ignore[arg-type]


P, V, A, T = phrase, WORDS.verb, WORDS.adjective, WORDS.time
CASES: Sequence[tuple[Clause, str, str, str]] = [
    (clause(P("the old man"), "buy", object=P("a red car")), "the old man buys a red car",
     "le vieil homme achète une voiture rouge", "der alte Mann kauft ein rotes Auto"),
    (clause(P("my friend"), "see", object=P("this beautiful elephant")), "my friend sees this beautiful elephant",
     "mon ami voit ce bel éléphant", "mein Freund sieht diesen schönen Elefanten"),
    (clause(P("a spider"), "hear", object=P("the owl")), "a spider hears the owl",
     "une araignée entend le hibou", "eine Spinne hört die Eule"),
    (clause(P("three old horse", True), "sleep", adverbials=(at("under", "the tree"),)),
     "three old horses sleep under the tree",
     "trois vieux chevaux dorment sous l'arbre", "drei alte Pferde schlafen unter dem Baum"),
    (clause(P("the girl"), "drink", object=P("cold water")), "the girl drinks cold water",
     "la fille boit de l'eau froide", "das Mädchen trinkt kaltes Wasser"),
    (clause(P("the child"), "eat", object=P("good soup")), "the child eats good soup",
     "l'enfant mange de la bonne soupe", "das Kind isst gute Suppe"),
    (clause(P("the child"), "eat", object=P("fresh bread")), "the child eats fresh bread",
     "l'enfant mange du pain frais", "das Kind isst frisches Brot"),
    (clause(P("the doctor"), "open", tense="modal", modal=V("want to"), object=P("the green window")),
     "the doctor wants to open the green window",
     "le médecin veut ouvrir la fenêtre verte", "der Arzt will das grüne Fenster öffnen"),
    (clause(P("the woman", True), "repair", tense="modal", modal=V("must"), object=P("our new bicycle"),
            time=T("tomorrow")),
     "the women must repair our new bicycle tomorrow",
     "les femmes doivent réparer notre nouveau vélo demain", "die Frauen müssen morgen unser neues Fahrrad reparieren"),
    (clause(P("the king"), "give", object=P("the white ring"), recipient=P("the queen")),
     "the king gives the white ring to the queen",
     "le roi donne la bague blanche à la reine", "der König gibt der Königin den weißen Ring"),
    (clause(P("anna"), "show", tense="past", object=P("a hat"), recipient=P("the brother", True)),
     "anna showed a hat to the brothers",
     "Anna a montré un chapeau aux frères", "Anna hat den Brüdern einen Hut gezeigt"),
    (clause(P("my uncle"), "offer", object=P("two lemon", True), recipient=P("the young boy")),
     "my uncle offers two lemons to the young boy",
     "mon oncle offre deux citrons au jeune garçon", "mein Onkel bietet dem jungen Jungen zwei Zitronen an"),
    (clause(P("our sister", True), "go", tense="past", adverbials=(at("to", "the market"),), time=T("yesterday")),
     "our sisters went to the market yesterday",
     "nos sœurs sont allées au marché hier", "unsere Schwestern sind gestern zum Markt gegangen"),
    (clause(P("a nurse"), "return", adverbials=(at("to", "the school"),), time=T("in the evening")),
     "a nurse returns to the school in the evening",
     "une infirmière retourne à l'école le soir", "eine Krankenschwester kehrt am Abend zur Schule zurück"),
    (clause(P("the baker"), "return", tense="modal", modal=V("can"), adverbials=(at("to", "the library"),)),
     "the baker can return to the library",
     "le boulanger peut retourner à la bibliothèque", "der Bäcker kann zur Bibliothek zurückkehren"),
    (clause(P("the girl"), "carry", object=P("a heavy box"), time=T("every day"), time_first=True),
     "every day the girl carries a heavy box",
     "tous les jours la fille porte une boîte lourde", "jeden Tag trägt das Mädchen eine schwere Kiste"),
    (clause(P("the tourist"), "lose", tense="past", object=P("the black umbrella"), time=T("last week"),
            time_first=True),
     "last week the tourist lost the black umbrella",
     "la semaine dernière le touriste a perdu le parapluie noir",
     "letzte Woche hat der Tourist den schwarzen Regenschirm verloren"),
    (clause(P("the goat"), predicate=A("tired"), very=True, attribute=at("behind", "our old house")),
     "the goat behind our old house is very tired",
     "la chèvre derrière notre vieille maison est très fatiguée", "die Ziege hinter unserem alten Haus ist sehr müde"),
    (clause(P("these apple", True), tense="past", predicate=A("sweet")),
     "these apples were sweet", "ces pommes étaient sucrées", "diese Äpfel waren süß"),
    (clause(P("a small black cat"), adverbials=(at("under", "the table"),)),
     "there is a small black cat under the table",
     "il y a un petit chat noir sous la table", "es gibt eine kleine schwarze Katze unter dem Tisch"),
    (clause(P("a big lion"), tense="past", adverbials=(at("in", "the garden"),)), "there was a big lion in the garden",
     "il y avait un grand lion dans le jardin", "es gab einen großen Löwen im Garten"),
    (clause(P("four expensive coat", True), adverbials=(at("beside", "the cupboard"),)),
     "there are four expensive coats beside the cupboard",
     "il y a quatre manteaux chers à côté de l'armoire", "es gibt vier teure Mäntel neben dem Schrank"),
    (clause(P("six owl", True), "wait", adverbials=(at("beside", "the castle"),)), "six owls wait beside the castle",
     "six hiboux attendent à côté du château", "sechs Eulen warten neben dem Schloss"),
    (clause(P("the student"), "love", negated=True, object=P("the proud judge")),
     "the student does not love the proud judge",
     "l'étudiant n'aime pas le juge fier", "der Student liebt den stolzen Richter nicht"),
    (clause(P("the woman"), "come", tense="past", negated=True, adverbials=(at("to", "the church"),)),
     "the woman did not come to the church",
     "la femme n'est pas venue à l'église", "die Frau ist nicht zur Kirche gekommen"),
    (clause(P("these child", True), "play", tense="past", adverbials=(at("without", "a neighbour"),)),
     "these children played without a neighbour",
     "ces enfants ont joué sans un voisin", "diese Kinder haben ohne einen Nachbarn gespielt"),
    (clause(P("laura"), "dance", adverbials=(at("with", "two soldier", True), at("in", "the kitchen"))),
     "laura dances with two soldiers in the kitchen",
     "Laura danse avec deux soldats dans la cuisine", "Laura tanzt mit zwei Soldaten in der Küche"),
    (Clause((P("emma"), P("julia")), V("arrive"), "past", adverbials=(at("behind", "the hotel"),)),
     "emma and julia arrived behind the hotel",
     "Emma et Julia sont arrivées derrière l'hôtel", "Emma und Julia sind hinter dem Hotel angekommen"),
    (Clause((P("the father"), P("my mother")), V("invite"), object=P("the famous singer")),
     "the father and my mother invite the famous singer",
     "le père et ma mère invitent le chanteur célèbre", "der Vater und meine Mutter laden den berühmten Sänger ein"),
    (clause(P("a uncle"), "choose", object=P("nine egg", True)), "an uncle chooses nine eggs",
     "un oncle choisit neuf œufs", "ein Onkel wählt neun Eier"),
    # From here on with words of the level "hard".
    (clause(P("the nephew"), "throw", tense="past", object=P("the golden crown"), recipient=P("a princess")),
     "the nephew threw the golden crown to a princess",
     "le neveu a lancé la couronne dorée à une princesse",
     "der Neffe hat einer Prinzessin die goldene Krone zugeworfen"),
    (clause(P("the shy giant"), "greet", object=P("our brave hero")), "the shy giant greets our brave hero",
     "le géant timide salue notre héros courageux", "der schüchterne Riese grüßt unseren mutigen Helden"),
    (clause(P("a huge bear"), "snore", adverbials=(at("behind", "the lighthouse"),)),
     "a huge bear snores behind the lighthouse",
     "un ours énorme ronfle derrière le phare", "ein riesiger Bär schnarcht hinter dem Leuchtturm"),
    (clause(P("the hero"), predicate=A("wise"), very=True), "the hero is very wise",
     "le héros est très sage", "der Held ist sehr weise"),
    (clause(P("these hamster", True), "flee", tense="past", adverbials=(at("to", "the valley"),)),
     "these hamsters fled to the valley",
     "ces hamsters ont fui à la vallée", "diese Hamster sind zum Tal geflohen"),
    (clause(P("the wife", True), "descend", tense="past", adverbials=(at("to", "the harbour"),),
            time=T("two days ago"), time_first=True),
     "two days ago the wives descended to the harbour",
     "il y a deux jours les épouses sont descendues au port",
     "vor zwei Tagen sind die Ehefrauen zum Hafen hinabgestiegen"),
    (clause(P("my aunt"), "prepare", tense="modal", modal=V("must"), object=P("tasty soup"), time=T("tonight")),
     "my aunt must prepare tasty soup tonight",
     "ma tante doit préparer de la soupe savoureuse ce soir", "meine Tante muss heute Abend leckere Suppe zubereiten"),
    (clause(P("the servant"), "refuse", object=P("sour lemonade")), "the servant refuses sour lemonade",
     "le serviteur refuse de la limonade acide", "der Diener lehnt saure Limonade ab"),
    (clause(P("a high tower"), adverbials=(at("beside", "the dark cave"),)),
     "there is a high tower beside the dark cave",
     "il y a une tour haute à côté de la grotte sombre", "es gibt einen hohen Turm neben der dunklen Höhle"),
    (clause(P("the carpenter"), "borrow", tense="past", negated=True, object=P("this axe")),
     "the carpenter did not borrow this axe",
     "le menuisier n'a pas emprunté cette hache", "der Tischler hat diese Axt nicht ausgeliehen"),
    (clause(P("these parrot", True), "frighten", object=P("the falcon")), "these parrots frighten the falcon",
     "ces perroquets effraient le faucon", "diese Papageien erschrecken den Falken"),
    (Clause((P("charlotte"), P("thomas")), V("depart"), "past"), "charlotte and thomas departed",
     "Charlotte et Thomas sont partis", "Charlotte und Thomas sind abgereist"),
]  # fmt: skip


@pytest.fixture(scope="module")
def sentences() -> list[Sentence]:
    world, rng = World(WorldConfig()), np.random.default_rng(0)
    return [world.sample(rng, "train") for _ in range(2000)]


@pytest.mark.parametrize(("said", "in_english", "in_french", "in_german"), CASES, ids=[case[1] for case in CASES])
def test_grammar(said: Clause, in_english: str, in_french: str, in_german: str) -> None:
    assert (english(said), french(said), german(said)) == (in_english, in_french, in_german)


def test_questions() -> None:
    asked = {question.question: question.answer for question in about(CASES[15][0])}
    assert asked == {
        "what does the girl carry": "heavy box",
        "who carries the box": "girl",
        "when does the girl carry the box": "every day",
        "what kind of box": "heavy",
    }


def test_easy_world_has_500_to_650_word_types(sentences: list[Sentence]) -> None:
    types = World(WorldConfig()).word_types()
    assert 500 <= len(types) <= 650
    assert {word for sentence in sentences for word in sentence.text.split()} <= types


def test_hard_world_has_1500_word_types_and_longer_sentences() -> None:
    world, rng = World(WorldConfig(level="hard", detail=1.8, min_words=5, max_words=16)), np.random.default_rng(0)
    types = world.word_types()
    assert len(types) >= 1500
    assert types > World(WorldConfig()).word_types()
    drawn = [world.sample(rng, "train") for _ in range(500)]
    lengths = [len(sentence.text.split()) for sentence in drawn]
    assert (min(lengths), max(lengths) > 13, np.mean(lengths) > 8) == (5, True, True)
    assert {word for sentence in drawn for word in sentence.text.split()} <= types
    assert all(text.isascii() and text.islower() for text in types)
    assert not any(form in f" {s.french} {s.german} ".split() for s in drawn for form in ("-", "None"))


def test_hard_words_differ_and_fit() -> None:
    words = lexicon.read("hard")
    for rows in (words.nouns, words.verbs, words.adjectives, words.times):
        forms = [row.en for row in rows]
        assert len(set(forms)) == len(forms)
    kinds = {noun.kind for noun in words.nouns}
    assert all({*verb.subjects, *verb.objects} <= kinds for verb in words.verbs)
    assert all(set(adjective.kinds) <= kinds for adjective in words.adjectives)
    assert all({*noun.places} <= set(words.prepositions) for noun in words.nouns)


def test_sentences_are_normalised_and_of_the_length_asked_for(sentences: list[Sentence]) -> None:
    assert all(sentence.text.replace(" ", "").isascii() for sentence in sentences)
    assert all(sentence.text.replace(" ", "").isalpha() and sentence.text.islower() for sentence in sentences)
    assert all(4 <= len(sentence.text.split()) <= 13 for sentence in sentences)
    assert not any("-" in f" {sentence.german} ".split() or "  " in sentence.french for sentence in sentences)
    assert {sentence.pattern for sentence in sentences} == set(PATTERNS)


def test_answers_are_words_of_the_sentence(sentences: list[Sentence]) -> None:
    for sentence in sentences:
        words = set(sentence.text.split())
        assert sentence.questions
        for question in sentence.questions:
            assert 1 <= len(question.answer.split()) <= 3
            assert set(question.answer.split()) <= words
    assert {question.kind for sentence in sentences for question in sentence.questions} == set(KINDS)


def test_one_sentence_has_one_translation(sentences: list[Sentence]) -> None:
    assert len({(s.text, s.french, s.german) for s in sentences}) == len({s.text for s in sentences})


def test_sampling_is_deterministic_and_keeps_to_the_split() -> None:
    world = World(WorldConfig())
    for split in ("train", "valid", "test"):
        first = [world.sample(rng, split) for rng in [np.random.default_rng(3)] for _ in range(20)]
        again = [world.sample(rng, split) for rng in [np.random.default_rng(3)] for _ in range(20)]
        assert first == again
        assert {split_of(sentence.text) for sentence in first} == {split}


def test_split_shares() -> None:
    splits = [split_of(f"sentence {number}") for number in range(10_000)]
    assert 0.88 < splits.count("train") / 10_000 < 0.92
    assert 0.04 < splits.count("valid") / 10_000 < 0.06


@pytest.mark.parametrize("bad", [{"level": "harder"}, {"patterns": ["poem"]}, {"detail": -1.0}, {"max_words": 3}])
def test_bad_values_name_their_key(bad: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        from_mapping(WorldConfig, bad, where="test")
