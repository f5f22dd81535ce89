"""Prompts, pure: messages with one ``{speech}`` where the speech stands; :mod:`sm_train.chat` makes ids of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sm_train import config
from sm_train.errors import UserError
from sm_train.records import Task

SPEECH = "{speech}"
_NAMES = (
    "ar Arabic, ca Catalan, cs Czech, da Danish, de German, el Greek, en English, es Spanish, et Estonian, fa Persian, "
    "fi Finnish, fr French, hi Hindi, hu Hungarian, id Indonesian, it Italian, ja Japanese, ko Korean, lt Lithuanian, "
    "lv Latvian, nl Dutch, no Norwegian, pl Polish, pt Portuguese, ro Romanian, ru Russian, sk Slovak, sl Slovenian, "
    "sv Swedish, ta Tamil, tr Turkish, uk Ukrainian, vi Vietnamese, zh Chinese"
)
LANGUAGES = {code: name for code, _, name in (pair.partition(" ") for pair in _NAMES.split(", "))}
"""Code (ISO 639-1) -> the language's name in English, as prompts have it."""


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The paraphrases of each task, those for training and those held out."""

    prompts: Mapping[str, Mapping[str, Sequence[str]]]
    """task -> group (train | held_out) -> messages"""

    def of(self, task: str, group: str) -> Sequence[str]:
        """A task's paraphrases.

        Raises:
            UserError: there are none for this task and group.
        """
        choices = self.prompts.get(task, {}).get(group, [])
        if not choices:
            raise UserError(f"the prompt file has no {group} prompts for the task {task!r}")
        return choices

    def choose(self, task: str, group: str, seed: int, item: str) -> str:
        """One of a task's paraphrases, by a hash of (seed, item, task): no random state.

        Raises:
            UserError: there are no prompts for this task and group.
        """
        choices = self.of(task, group)
        digest = hashlib.blake2b(f"{seed}/{item}/{task}".encode(), digest_size=8).digest()
        return choices[int.from_bytes(digest, "big") % len(choices)]


def read_prompts(path: Path) -> PromptSet:
    """Read ``task: {train: [...], held_out: [...]}``.

    Raises:
        UserError: the file is missing, or a prompt has not exactly one ``{speech}``.
    """
    prompts = config.read_yaml(path)
    for task, groups in prompts.items():
        if not isinstance(groups, dict):
            raise UserError(f"prompts {path}: {task} must map train and held_out to lists of messages")
        for group, messages in groups.items():
            if not isinstance(messages, list) or not all(isinstance(message, str) for message in messages):
                raise UserError(f"prompts {path}: {task}.{group} must be a list of messages")
            for message in messages:
                require_speech(message, f"prompts {path}, {task}.{group}")
    return PromptSet(prompts)


def require_speech(message: str, where: str) -> None:
    """Raises UserError unless a message has exactly one ``{speech}``."""
    if message.count(SPEECH) != 1:
        raise UserError(f"{where}: {message!r} has {message.count(SPEECH)} {SPEECH} placeholders; it needs exactly one")


def with_speech(prompt: str) -> str:
    """A person's prompt as a message: behind the speech, unless it says itself where the speech stands.

    Raises:
        UserError: it is empty, has more than one ``{speech}``, or a placeholder that nothing fills.
    """
    if not prompt.replace(SPEECH, "").strip():
        raise UserError(f"the prompt is {prompt!r}; say what to do with the speech")
    if unfilled := set(re.findall(r"\{[a-z_]+\}", prompt)) - {SPEECH}:
        raise UserError(f"the prompt has {min(unfilled)}, which nothing fills; write the words themselves")
    message = prompt if SPEECH in prompt else f"{SPEECH}\n{prompt}"
    require_speech(message, "the prompt")
    return message


def fill(message: str, variables: Mapping[str, str]) -> str:
    """A message with every placeholder but ``{speech}`` filled.

    Raises:
        UserError: a placeholder has no variable, or one that holds ``{speech}`` itself.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name == "speech":
            return SPEECH
        if name not in variables:
            raise UserError(f"prompt {message!r}: no value for {{{name}}}; there are: {', '.join(variables) or 'none'}")
        if SPEECH in variables[name]:
            raise UserError(f"prompt {message!r}: the value {variables[name]!r} of {{{name}}} holds {SPEECH} itself")
        return variables[name]

    return re.sub(r"\{(\w+)\}", value, message)


def message_for(prompt: str, task: Task) -> str:
    """A task's prompt with its variables filled, ``{target_language}`` among them, by its code or as a variable.

    Raises:
        UserError: the prompt asks for a variable that the task does not have.
    """
    named = {"target_language": LANGUAGES[task.target_lang]} if task.target_lang in LANGUAGES else {}
    return fill(prompt, {**named, **task.variables})
