"""The miniature's conversations: prompts, their generated variants, and how text becomes token ids.

A prompt is a user message with one ``{speech}`` alone on its line, where the transcript (later: the speech) stands.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from sm_train.config import read_yaml
from tools.miniature.world import Sentence

SPEECH = "{speech}"
PAD, BOS, USER, ASSISTANT, END = SPECIAL_TOKENS = ["<pad>", "<bos>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TARGETS = {"French": "french", "German": "german"}
"""Target language as prompts name it -> the field of a sentence that holds it."""

_TEXT = [
    " the text below",
    " the following text",
    " this sentence",
    " the sentence",
    " this text",
    " the words",
    " this",
]
_VARIANTS: dict[str, list[list[str]]] = {
    "asr": [
        ["Repeat", "Copy", "Transcribe", "Write down", "Write", "Type", "Say", "Give", "Please repeat", "Spell out"],
        [*_TEXT, " what was said", " what you hear", " what was spoken"],
        ["", " exactly", " again", ", word for word", " without any change", " as it is", " in English", " literally"],
        [".", ":"],
    ],
    "st": [
        ["Translate", "Put", "Say", "Give", "Write", "Express", "Turn", "Please translate", "Render"],
        [*_TEXT, " what was said", " the same", " the translation of this", " the meaning"],
        [" into {target_language}", " in {target_language}", " to {target_language}"],
        [".", ":", ", please."],
    ],
    "sqa": [
        ["", "Here is a text. ", "Listen. ", "Read this. ", "Look at this sentence. ", "Consider the text. "],
        ["Answer the question", "Answer this", "Answer", "Please answer", "Give the answer", "Reply"],
        ["", " about the text", " about this sentence", " from the text", " with the sentence", " about it"],
        [". {question}?", ": {question}?", ". Question: {question}?", ", {question}?"],
    ],
}


@dataclass(frozen=True)
class Example:
    """One exchange: a prompt whose variables are filled, the transcript, and the answer."""

    task: str
    prompt: str
    transcript: str
    answer: str


class Prompts:
    """The prompts of a YAML file, and generated variants of them that are never the held-out ones."""

    def __init__(self, path: Path) -> None:
        self._prompts: dict[str, dict[str, list[str]]] = read_yaml(path)
        self._variants = {task: self._generate(task) for task in self._prompts}

    @property
    def tasks(self) -> list[str]:
        """asr, st, sqa."""
        return list(self._prompts)

    def of(self, task: str, group: str) -> list[str]:
        """The prompts of a task: group ``train``, ``held_out`` or ``variants``."""
        return self._variants[task] if group == "variants" else self._prompts[task][group]

    def sample(self, rng: np.random.Generator, task: str, variants: float) -> str:
        """A training prompt, a generated one with probability ``variants``."""
        choices = self.of(task, "variants" if rng.random() < variants else "train")
        return choices[rng.integers(len(choices))]

    def _generate(self, task: str) -> list[str]:
        """Every wording of the task's grammar, before and behind the speech, but for those in the held-out prompts."""
        held_out = {_wording(line) for prompt in self._prompts[task]["held_out"] for line in prompt.split("\n")}
        instructions = ["".join(parts) for parts in itertools.product(*_VARIANTS[task])]
        kept = [line for line in instructions if _wording(line) not in held_out]
        split = [line.split(". ", 1) for line in kept if ". " in line] if task == "sqa" else []
        around = [f"{first}.\n{SPEECH}\n{last}" for first, last in split if _wording(first) not in held_out]
        both = [text for line in kept for text in (f"{line}\n{SPEECH}", f"{SPEECH}\n{line}")]
        allowed = {_wording(prompt) for prompt in self._prompts[task]["held_out"]}
        return [text for text in [*both, *around] if _wording(text) not in allowed]


def _wording(text: str) -> str:
    """The words alone: two prompts that differ only in punctuation and case are one wording."""
    return " ".join(re.findall(r"\w+", text.lower()))


def examples_of(sentence: Sentence, task: str, prompt: str, pick: int) -> Example:
    """One example of a task on a sentence; ``pick`` chooses the language or the question."""
    if task == "st":
        language = list(TARGETS)[pick % len(TARGETS)]
        answer = getattr(sentence, TARGETS[language])
        return Example(task, prompt.replace("{target_language}", language), sentence.text, answer)
    if task == "sqa":
        question = sentence.questions[pick % len(sentence.questions)]
        return Example(task, prompt.replace("{question}", question.question), sentence.text, question.answer)
    return Example(task, prompt, sentence.text, sentence.text)


def chat_pieces(tokenizer: PreTrainedTokenizerFast, prompt: str) -> tuple[str, str]:
    """The chat string before and behind the speech, up to where the assistant's answer begins."""
    message = [{"role": "user", "content": prompt}]
    whole = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    prefix, suffix = whole.split(SPEECH)
    return prefix, suffix


class Encoder:
    """Text to token ids, each distinct piece once."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._ids: dict[str, list[int]] = {}
        self._pieces: dict[str, tuple[str, str]] = {}

    def ids(self, text: str) -> list[int]:
        """The ids of a text, without special tokens of its own."""
        if text not in self._ids:
            self._ids[text] = self._tokenizer.encode(text, add_special_tokens=False)
        return self._ids[text]

    def prompt_ids(self, example: Example, num_pads: int = 0) -> list[int]:
        """Prefix, transcript, pads where speech would leave them, suffix."""
        if example.prompt not in self._pieces:
            self._pieces[example.prompt] = chat_pieces(self._tokenizer, example.prompt)
        prefix, suffix = self._pieces[example.prompt]
        pads = [self._tokenizer.pad_token_id] * num_pads
        return self.ids(prefix) + self.ids(example.transcript) + pads + self.ids(suffix)

    def answer_ids(self, example: Example) -> list[int]:
        """The answer and the token that ends it."""
        return [*self.ids(example.answer), self._tokenizer.eos_token_id]
