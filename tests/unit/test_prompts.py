"""Prompts: placeholders, choice, and the seams of the chat string."""

from pathlib import Path

import pytest

from sm_train.errors import UserError
from sm_train.prompts import PromptSet, chat_halves, fill, read_prompts, require_speech

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


class WordTokenizer:
    """Characters as ids, in a chat template of one line."""

    chat_template = "yes"

    def apply_chat_template(self, turns: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        return f"<user>{turns[0]['content']}<end><assistant>" if add_generation_prompt else ""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def test_halves_stand_around_the_speech() -> None:
    prefix, suffix = chat_halves(WordTokenizer(), "Repeat.\n{speech}\nNow.")
    assert "".join(map(chr, prefix)) == "<user>Repeat.\n"
    assert "".join(map(chr, suffix)) == "\nNow.<end><assistant>"
