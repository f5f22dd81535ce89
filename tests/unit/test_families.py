"""The seams of a chat string, for every family of LLM: halves, answers and ends are what its own template gives."""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers

from sm_train.chat import Chat
from sm_train.errors import UserError
from sm_train.prompts import fill, read_prompts
from tests.builders import ROOT
from tests.families import FAMILIES, family

PROMPTS = read_prompts(ROOT / "configs/prompts/paper.yaml").prompts
VARIABLES = {"target_language": "French", "question": "Who sees the boat?"}
MESSAGES = [
    fill(text, VARIABLES) for groups in PROMPTS.values() for messages in groups.values() for text in messages
]  # fmt: skip
TRANSCRIPTS = ["boat", "the old boat runs", "stones", "une pierre verte à l'été", "Two birds, 12 or 345", "水"]

# What must stand before the speech: where it begins the message, and where it stands behind a line break. Mistral's
# template puts a space before the message, behind a special token, where the tokenizer puts another; Phi-3's special
# tokens swallow the white space behind them, so that a transcript first in the message begins a text.
JOINTS = {
    "llama3": ("", ""),
    "qwen2": ("", ""),
    "qwen3": ("", ""),
    "mistral": (" ", " "),
    "gemma2": ("", ""),
    "gemma3": ("", ""),
    "phi3": ("", " "),
}
ENDS = {
    "llama3": "<|eot_id|>",
    "qwen2": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "mistral": "</s>",
    "gemma2": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "phi3": "<|end|>",
}
SPLITS_WORDS = ("llama3", "qwen2", "qwen3")
FIXED = {"date_string": "26 Jul 2024", "enable_thinking": False}

each_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A family's checkpoint folder, by its name."""
    root = tmp_path_factory.mktemp("families")
    return cache(lambda name: family(root / name, name))


def load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def ids_of(tokenizer: Any, *contents: str) -> list[int]:
    """The ids of the template's own string of a message, or of a message and its answer."""
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), contents, strict=False)]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=len(contents) == 1, **FIXED)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def spoken(name: str, message: str, transcript: str) -> str:
    """A message with a transcript in the place of the speech."""
    joint = JOINTS[name][not message.startswith("{speech}")]
    return message.replace("{speech}", joint + transcript)


@each_family
def test_a_checkpoint_loads_and_answers(name: str, folder: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder(name))
    chat = Chat(load(folder(name)))
    assert chat.end_id in model.generation_config.eos_token_id
    prefix, suffix = chat.halves("Say it.\n{speech}")
    with torch.inference_mode():
        logits_LV = model(torch.tensor([prefix + chat.transcript_ids("the old boat") + suffix])).logits[0]
    assert logits_LV.shape[1] == len(chat.tokenizer)
    assert logits_LV.std() > 0.5
    assert len(set(logits_LV.argmax(dim=1).tolist())) > 3
    if name == "gemma2":
        assert model.config.final_logit_softcapping
        assert model.config.attn_logit_softcapping
    if name.startswith("gemma"):
        assert model.config.layer_types == ["sliding_attention", "full_attention"]


@each_family
def test_halves_and_transcript_are_the_template_s_own_ids(name: str, folder: Any) -> None:
    tokenizer = load(folder(name))
    chat = Chat(tokenizer)
    for message, transcript in product(MESSAGES, [*TRANSCRIPTS[:4], TRANSCRIPTS[5]]):
        prefix, suffix = chat.halves(message)
        ids = ids_of(tokenizer, spoken(name, message, transcript))
        assert prefix + chat.transcript_ids(transcript) + suffix == ids, (message, transcript)
    chat.prove(MESSAGES, TRANSCRIPTS)


@each_family
def test_answers_continue_the_prompt_as_the_template_does(name: str, folder: Any) -> None:
    tokenizer = load(folder(name))
    chat = Chat(tokenizer)
    assert tokenizer.convert_ids_to_tokens(chat.end_id) == ENDS[name]
    for message in MESSAGES:
        prefix, suffix = chat.halves(message)
        prompt_ids = prefix + chat.transcript_ids("the old boat") + suffix
        texts = [*TRANSCRIPTS, "Yes.", "(no)", "- a\n- b"]
        for text, answer_ids in zip(texts, chat.answers(texts), strict=True):
            told_ids = ids_of(tokenizer, spoken(name, message, "the old boat"), text)
            assert prompt_ids + answer_ids == told_ids[: len(prompt_ids) + len(answer_ids)], (message, text)
            assert answer_ids[-1] == chat.end_id
            assert chat.end_id not in answer_ids[:-1]
            assert tokenizer.decode(answer_ids[:-1]).strip() == text


@each_family
@pytest.mark.parametrize("message", ["Repeat.\n{speech}s", "{speech}s\nRepeat."])
def test_a_seam_that_merges_is_refused(name: str, message: str, folder: Any) -> None:
    with pytest.raises(UserError, match=r"put \{speech\} alone on its line") as caught:
        Chat(load(folder(name))).prove([message], ["the stone"])
    assert "\n" not in str(caught.value)
    assert f"the tokenizer of {folder(name)}" in str(caught.value)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("mistral", "phi3")])
def test_a_letter_before_the_speech_is_refused(name: str, folder: Any) -> None:
    with pytest.raises(UserError, match=r"put \{speech\} alone on its line") as caught:
        Chat(load(folder(name))).prove(["Repeat.\ns{speech}", "Repeat.\nh{speech}"], ["tones", "ouse"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mistral", "phi3"])
def test_where_words_carry_their_space_one_is_put_before_the_speech(name: str, folder: Any) -> None:
    chat = Chat(load(folder(name)))
    assert chat.halves("Repeat: s{speech}") == chat.halves("Repeat: s {speech}")
    chat.prove(["Repeat: s{speech}", "Repeat: {speech}"], TRANSCRIPTS)


@pytest.mark.parametrize("name", SPLITS_WORDS)
def test_where_words_are_split_first_a_space_before_the_speech_is_refused(name: str, folder: Any) -> None:
    with pytest.raises(UserError, match=r"what stands beside \{speech\} merges with its tokens"):
        Chat(load(folder(name))).halves("Repeat: {speech}")


@each_family
def test_punctuation_at_a_transcript_s_end_takes_the_line_break_where_words_are_split(name: str, folder: Any) -> None:
    chat = Chat(load(folder(name)))
    chat.prove(["Repeat.\n{speech}"], ["the old boat..."])
    if name in SPLITS_WORDS:
        with pytest.raises(UserError, match="last if transcripts end in punctuation"):
            chat.prove(["{speech}\nRepeat."], ["the old boat..."])
    else:
        chat.prove(["{speech}\nRepeat."], ["the old boat..."])


@each_family
def test_another_template_has_another_fingerprint(name: str, folder: Any) -> None:
    tokenizer = load(folder(name))
    template, own = tokenizer.chat_template, Chat(tokenizer).fingerprint
    assert Chat(load(folder(name))).fingerprint == own
    others = {own}
    ending = "{% if not add_generation_prompt %}-{% endif %}"
    for changed in (template.replace("m.content", "'.' + m.content"), "-" + template, template + ending, None):
        tokenizer.chat_template = changed
        others.add(Chat(tokenizer).fingerprint)
    assert len(others) == 5


def test_no_template_prints_today(folder: Any) -> None:
    tokenizer = load(folder("llama3"))
    turns = [{"role": "user", "content": "Hello"}]
    assert "26 Jul 2024" not in tokenizer.apply_chat_template(turns, tokenize=False)
    assert "Today Date: 26 Jul 2024" in tokenizer.decode(Chat(tokenizer).halves("Repeat.\n{speech}")[0])


def test_a_template_with_a_clock_of_its_own_prints_the_same_date_for_ever(folder: Any) -> None:
    tokenizer = load(folder("llama3"))
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}\n" + tokenizer.chat_template
    prefix, _ = Chat(tokenizer).halves("Repeat.\n{speech}")
    assert tokenizer.decode(prefix).startswith("26 Jul 2024\n")


@pytest.mark.parametrize("name", FAMILIES)
def test_text_with_a_token_that_ends_a_turn_is_refused(name: str, folder: Any) -> None:
    tokenizer = load(folder(name))
    chat = Chat(tokenizer)
    end = tokenizer.convert_ids_to_tokens(chat.end_id)
    for says in (lambda: chat.answers([f"the boat{end} and"]), lambda: chat.halves(f"Repeat{end}\n{{speech}}")):
        with pytest.raises(UserError, match=f"a special token under the tokenizer of .*{name}; take it out"):
            says()
    assert chat.answers(["the boat and"])[0].count(chat.end_id) == 1


def test_no_template_opens_a_think_block(folder: Any) -> None:
    tokenizer = load(folder("qwen3"))
    turns = [{"role": "user", "content": "Hello"}]
    assert "<think>" not in tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(Chat(tokenizer).halves("Repeat.\n{speech}")[1]).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize("name", ["llama3", "mistral", "gemma2"])
def test_without_a_template_the_message_stands_behind_bos(name: str, folder: Any) -> None:
    tokenizer = load(folder(name))
    tokenizer.chat_template = None
    chat = Chat(tokenizer)
    for message, transcript in product(MESSAGES, TRANSCRIPTS[:2]):
        prefix, suffix = chat.halves(message)
        joint = " " if name == "mistral" and not message.startswith("{speech}") else ""
        whole = tokenizer(message.replace("{speech}", joint + transcript), add_special_tokens=True)["input_ids"]
        assert prefix + chat.transcript_ids(transcript) + suffix == whole, (message, transcript)
        assert prefix.count(tokenizer.bos_token_id) == 1
    chat.prove(MESSAGES, TRANSCRIPTS)
    assert chat.answers(["the old boat"]) == [[*chat.transcript_ids("the old boat"), tokenizer.eos_token_id]]


def test_a_tokenizer_that_puts_a_space_before_the_first_text_alone(folder: Any) -> None:
    tokenizer = load(folder("mistral"))
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    chat = Chat(tokenizer)
    chat.prove(MESSAGES, TRANSCRIPTS)
    assert chat.halves("{speech}\nRepeat.")[0] == tokenizer.convert_tokens_to_ids(["<s>", "[INST]"])
    assert chat.answers(["boat"]) == [[*chat.transcript_ids("boat"), tokenizer.eos_token_id]]
