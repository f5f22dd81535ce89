"""Prompts: placeholders, choice, and the seams of the chat string."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sm_train.chat import PROBE, Chat
from sm_train.errors import UserError
from sm_train.prompts import PromptSet, fill, read_prompts, require_speech
from tests.builders import ROOT

MESSAGE = "Repeat.\n{speech}\nNow."
PROMPTS = PromptSet({"asr": {"train": [f"Say {i}.\n{{speech}}" for i in range(5)], "held_out": []}})


def test_fill_leaves_the_speech_and_fills_the_rest() -> None:
    assert fill("{speech}\nInto {target_language}: {q}?", {"target_language": "French", "q": "who"}) == (
        "{speech}\nInto French: who?"
    )


def test_a_filled_value_is_not_filled_again() -> None:
    assert fill("{q} {speech}", {"q": "{x} {q}", "x": "no"}) == "{x} {q} {speech}"


def test_a_value_cannot_bring_a_second_speech() -> None:
    with pytest.raises(UserError, match=r"holds \{speech\} itself"):
        fill("{q} {speech}", {"q": "what is {speech}"})


def test_a_missing_variable_is_named() -> None:
    with pytest.raises(UserError, match=r"no value for \{question\}; there are: x"):
        fill("{speech} {question}", {"x": "y"})


@pytest.mark.parametrize("message", ["no placeholder", "{speech} and {speech}"])
def test_exactly_one_speech(message: str) -> None:
    with pytest.raises(UserError, match="needs exactly one"):
        require_speech(message, "here")


def test_choice_is_pure_and_spread() -> None:
    chosen = [PROMPTS.choose("asr", "train", 0, f"utt-{i}") for i in range(200)]
    assert chosen == [PROMPTS.choose("asr", "train", 0, f"utt-{i}") for i in range(200)]
    assert set(chosen) == set(PROMPTS.prompts["asr"]["train"])
    assert chosen != [PROMPTS.choose("asr", "train", 1, f"utt-{i}") for i in range(200)]


def test_no_prompts_for_a_task_is_an_error() -> None:
    with pytest.raises(UserError, match="no held_out prompts for the task 'asr'"):
        PROMPTS.choose("asr", "held_out", 0, "utt")


def test_a_prompt_file_with_a_bad_prompt_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text("asr:\n  train: ['say it']\n")
    with pytest.raises(UserError, match=r"asr\.train: 'say it' has 0"):
        read_prompts(path)


class CharTokenizer:
    """Characters as ids, in a chat template of one line that a test may change; "." and "!" are added tokens."""

    name_or_path = "chars"
    bos_token_id, eos_token_id = 2, 3

    def __init__(self, user: str = "<{}>?", answer: str = " {}.", templated: bool = True) -> None:
        self.user, self.answer, self.chat_template = user, answer, "yes" if templated else None
        self.added_tokens_decoder = {ord(token): SimpleNamespace(special=token == "!", content=token) for token in ".!"}
        self.rendered = 0

    def apply_chat_template(self, turns: list[dict[str, str]], tokenize: bool, **settings: Any) -> str:
        self.rendered += 1
        assert not tokenize
        assert settings["date_string"] == "26 Jul 2024"
        assert settings["enable_thinking"] is False
        assert settings["add_generation_prompt"] == (len(turns) == 1)
        said = self.user.replace("{}", turns[0]["content"])
        return said + (self.answer.replace("{}", turns[1]["content"]) if len(turns) == 2 else "")

    def __call__(self, text: str | list[str], add_special_tokens: bool) -> dict[str, Any]:
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text] if isinstance(text, str) else [[ord(c) for c in t] for t in text]}


def text_of(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def test_halves_stand_around_the_speech() -> None:
    prefix, suffix = Chat(CharTokenizer()).halves(MESSAGE)
    assert text_of(prefix) == "<Repeat.\n"
    assert text_of(suffix) == "\nNow.>?"


def test_halves_are_found_once_and_cannot_be_spoilt() -> None:
    tokenizer = CharTokenizer()
    chat = Chat(tokenizer)
    first = chat.halves(MESSAGE)
    rendered = tokenizer.rendered
    first[0].append(0)
    assert text_of(chat.halves(MESSAGE)[0]) == "<Repeat.\n"
    assert tokenizer.rendered == rendered


def test_outer_white_space_of_a_message_is_dropped() -> None:
    chat = Chat(CharTokenizer())
    assert chat.halves(f"\n {MESSAGE} ") == chat.halves(MESSAGE)


def test_answers_follow_the_prompt_and_end_in_the_end() -> None:
    chat = Chat(CharTokenizer())
    assert [text_of(ids) for ids in chat.answers([" ab\n", ""])] == [" ab.", " ."]
    assert chat.answers([]) == []
    assert chat.end_id == ord(".")


@pytest.mark.parametrize("answer", [" {}", " {};.", "{}\n"])
def test_without_an_added_token_behind_it_an_answer_ends_in_eos(answer: str) -> None:
    assert Chat(CharTokenizer(answer=answer)).end_id == CharTokenizer.eos_token_id


def test_white_space_ends_no_answer_even_as_an_added_token() -> None:
    tokenizer = CharTokenizer(answer="{}\n")
    tokenizer.added_tokens_decoder[ord("\n")] = SimpleNamespace(special=False, content="\n")
    assert Chat(tokenizer).end_id == CharTokenizer.eos_token_id


def test_an_answer_that_nothing_ends_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CharTokenizer, "eos_token_id", None)
    with pytest.raises(UserError, match="the tokenizer of chars names no token that ends an answer: set eos_token"):
        Chat(CharTokenizer(answer="{}"))


def test_without_a_template_a_prompt_is_bos_and_the_message() -> None:
    chat = Chat(CharTokenizer(templated=False))
    prefix, suffix = chat.halves(f"{MESSAGE}\n")
    assert prefix == [2, *map(ord, "Repeat.\n")]
    assert text_of(suffix) == "\nNow.\n"
    assert chat.answers(["ab"]) == [[*map(ord, "ab"), 3]]
    chat.prove([MESSAGE], ["a", "a b"])


@pytest.mark.parametrize(("user", "answer"), [("<>", "{}{}"), ("{}{}", "."), ("{}", "{}{}"), ("{}", ".")])
def test_a_template_that_does_not_print_a_message_once_is_refused(user: str, answer: str) -> None:
    with pytest.raises(UserError, match="does not print a message once"):
        Chat(CharTokenizer(user, answer))


def test_a_template_that_continues_otherwise_than_it_asks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = CharTokenizer()
    render = tokenizer.apply_chat_template
    thinking = lambda turns, **settings: render(turns, **settings) + ("think:" if len(turns) == 1 else "")  # noqa: E731
    monkeypatch.setattr(tokenizer, "apply_chat_template", thinking)
    with pytest.raises(UserError, match="continues a prompt otherwise than it asks"):
        Chat(tokenizer)


def test_a_message_that_the_template_changes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = CharTokenizer()
    chat = Chat(tokenizer)
    render = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **settings: render(*a, **settings).lower())
    with pytest.raises(UserError, match="the chat template beside the tokenizer of chars changes it"):
        chat.prove([MESSAGE], [])
    chat.prove([MESSAGE.lower()], ["a"])


def test_an_answer_that_merges_with_the_prompt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Chat(CharTokenizer(user="<{}>!?"))
    merged = lambda texts, add_special_tokens: {"input_ids": [[1] for _ in texts]}  # noqa: E731
    monkeypatch.setattr(chat, "tokenizer", merged)
    with pytest.raises(UserError, match=r"the answer 'ab' merges with the prompt's end '!\?'"):
        chat.answers(["ab"])


def test_an_answer_that_depends_on_the_prompt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Chat(CharTokenizer())
    chat.prove([MESSAGE], ["ab"])
    monkeypatch.setattr(chat, "answers", lambda texts: [[*map(ord, f"  {text}.")] for text in texts])
    with pytest.raises(UserError, match="the tokens of 'ab' are not the same"):
        chat.prove([MESSAGE], ["ab"])


def test_the_fingerprint_holds_what_the_template_adds() -> None:
    others = [("({}>?", " {}."), ("<{})?", " {}."), ("<{}>?", "{}."), ("<{}>?", " {}!"), ("<{}>?", " {}.\n")]
    prints = {Chat(CharTokenizer(user, answer)).fingerprint for user, answer in others}
    assert len(prints | {Chat(CharTokenizer()).fingerprint}) == len(others) + 1
    assert Chat(CharTokenizer()).fingerprint == Chat(CharTokenizer()).fingerprint


def test_no_shipped_prompt_holds_the_probe() -> None:
    for path in (ROOT / "configs/prompts").glob("*.yaml"):
        assert PROBE not in path.read_text()
