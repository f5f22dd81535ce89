"""The language of an answer: lists of words, the library, and the miniature's own lists."""

from __future__ import annotations

import json
import pickle
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from sm_train.errors import UserError
from sm_train.scoring.language import Lexicon, Library, is_in, open_languages, words
from tests.builders import ROOT
from tools.miniature import corpus, lexicon
from tools.miniature.forms import word_forms
from tools.miniature.patterns import PATTERNS
from tools.miniature.world import World, WorldConfig

LISTS = {"en": ["the", "a", "cat", "Paul"], "fr": ["le", "l'été", "chat", "a", "Paul"], "de": ["die", "Katze", "Paul"]}


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(["en", "fr", "de", "es", "it", "zh"])


@pytest.mark.parametrize(
    ("text", "languages"),
    [
        ("The cat.", {"en"}),
        ("le chat a dit", {"fr"}),
        ("DIE Katze", {"de"}),
        ("Paul", {"en", "fr", "de"}),
        ("a", {"en", "fr"}),
        ("l'hiver", {"fr"}),  # l' alone is known
        (unicodedata.normalize("NFD", "Été"), {"fr"}),
        ("the chat cat", {"en"}),
        ("", set()),
        ("12 !", set()),
        ("xyzzy thex", set()),
    ],
)
def test_the_list_that_knows_the_most_words(text: str, languages: set[str]) -> None:
    assert Lexicon(LISTS).of(text) == languages


def test_a_tie_counts_for_the_language_asked_for() -> None:
    known = Lexicon(LISTS)
    assert is_in(known, "a", "fr")
    assert is_in(known, "a", "fr-CA")
    assert not is_in(known, "a", "de")
    assert not is_in(known, "", "fr")


def test_words_are_letters_in_lower_case() -> None:
    assert words("L'Été, aujourd'hui: 3 Äpfel_rot") == ["l", "été", "aujourd", "hui", "äpfel", "rot"]


def test_the_signature_follows_from_the_words() -> None:
    assert Lexicon({"fr": ["le", "la"]}).signature == Lexicon({"fr": ["la", "le"]}).signature
    assert Lexicon({"fr": ["le", "la"]}).signature != Lexicon({"fr": ["le"]}).signature


@pytest.mark.parametrize(
    ("text", "languages"),
    [
        ("the old man is buying a car in town", {"en"}),
        ("le vieil homme achète une voiture en ville", {"fr"}),
        ("der alte Mann kauft ein Auto in der Stadt", {"de"}),
        ("这个老人在城里买了一辆车", {"zh"}),
        ("", set()),
        (" \n", set()),
        ("12 345", set()),
    ],
)
def test_the_library_tells_sentences_and_admits_ignorance(library: Library, text: str, languages: set[str]) -> None:
    assert library.of(text) == languages


def test_the_library_considers_what_is_asked_for() -> None:
    sentence = "o gato preto não quer dormir no telhado da casa velha, mas o cão já está dormindo"
    assert open_languages(None, ["fr"], ["en", "es"]).of(sentence).isdisjoint({"pt"})
    asked = open_languages(None, ["pt-BR"], ["en", "es"])
    assert is_in(asked, sentence, "pt-BR")
    assert "pt" in asked.signature
    with pytest.raises(UserError, match="does not know the language 'tlh'; set lexicon"):
        open_languages(None, ["tlh"])


def test_the_library_unpickles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something is unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert Library(["en", "fr"]).of("le chat dort dans la maison") == {"fr"}


@pytest.mark.parametrize("text", ["[]", '{"fr": "le la"}', '{"fr": [1]}', '{"fr": []}'])
def test_what_is_no_lexicon_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "lexicon.json").write_text(text)
    with pytest.raises(UserError, match="must map languages to lists of words"):
        open_languages(str(tmp_path / "lexicon.json"), ["fr"])


def test_a_lexicon_must_know_what_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "lexicon.json"
    path.write_text(json.dumps({"en": ["the"], "fr": ["le"]}))
    assert open_languages(str(path), ["fr"]).of("le") == {"fr"}
    with pytest.raises(UserError, match="no words of 'de', which is asked for; it has en, fr"):
        open_languages(str(path), ["fr", "de"])
    with pytest.raises(UserError, match=r"nowhere\.json does not exist"):
        open_languages(str(tmp_path / "nowhere.json"), ["fr"])


def test_the_miniatures_lists_hold_all_that_it_says() -> None:
    forms = word_forms(lexicon.read())
    known = Lexicon(forms)
    world, rng = World(WorldConfig(patterns=list(PATTERNS), detail=1.5)), np.random.default_rng(5)
    for _ in range(1500):
        sentence = world.sample(rng, "test")
        for language, text in (("en", sentence.text), ("fr", sentence.french), ("de", sentence.german)):
            assert set(words(text)) <= set(forms[language]), text
            assert known.of(text) == {language}, text


def test_the_miniatures_lists_are_made_fast_and_alike() -> None:
    begin = time.process_time()
    first = word_forms(lexicon.read())
    assert time.process_time() - begin < 4
    assert word_forms(lexicon.read()) == first
    assert all(forms == sorted(set(forms)) for forms in first.values())


def test_a_corpus_has_its_words_also_one_from_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(ROOT / "configs" / "miniature" / "easy.yaml"), f"out={tmp_path}", "workers=1"]
    command += ["train=1", "valid=1", "test=1", "test_voices=0"]
    corpus.main(command)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert set(json.loads(before[tmp_path / "lexicon.json"])) == {"en", "fr", "de"}
    (tmp_path / "lexicon.json").unlink()
    corpus.main(command)
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
