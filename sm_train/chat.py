"""An LLM's chat template, pure: prompts and answers as token ids.

What the template makes of a message is tokenised whole, with a probe in the speech's place, and cut around the probe's
ids: of halves tokenised apart, SentencePiece would begin each with a space.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

from sm_train import config
from sm_train.errors import UserError
from sm_train.prompts import SPEECH, require_speech

PROBE = "the word zqxjk of the time"
"""Stands in for a content. It begins and ends in common words: what merges with a transcript merges with it."""
DATE = "26 Jul 2024"
"""What templates that print a date are given, so that tomorrow's ids are today's; Llama 3.1's own default."""


class Chat:
    """An LLM's chat template and Hugging Face fast tokenizer, as token ids around the speech and of the answer.

    Outer white space of messages and answers is dropped, as many templates drop it. Without a chat template a prompt is
    bos and the message as it stands, and an answer its own ids and eos.

    Raises:
        UserError: the template does not print a message once, or continues a prompt otherwise than it asks for an
            answer; or no token ends an answer.
    """

    end_id: int
    """The token that ends the assistant's turn."""
    fingerprint: str
    """A hash of all that the template adds to a message and to an answer, and of ``end_id``."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self._templated = tokenizer, bool(tokenizer.chat_template)
        self._named = f"the tokenizer of {tokenizer.name_or_path or 'an unnamed LLM'}"
        self._added = tokenizer.added_tokens_decoder
        self._template = tokenizer.chat_template
        if isinstance(self._template, str):  # templates with a clock of their own print the same date for ever
            self._template = f"{{%- macro strftime_now(format) %}}{DATE}{{% endmacro -%}}{self._template}"
        self._control_ids = {id for id, token in self._added.items() if token.special}
        self._opening = self._closing = self._lead = self._ending = ""
        bos_id = None if self._templated else tokenizer.bos_token_id  # a template writes it itself
        self._start_ids = [] if bos_id is None else [bos_id]
        if self._templated:
            self._read_template()
        self.end_id = self._find_end()
        self._context = self._find_context()
        self._context_ids = self.transcript_ids(self._context)
        self._lead_ids = set(self.transcript_ids(self._lead))
        self._one_at_a_time = threading.Lock()  # a loader's thread asks too, and tokenizers are not made for two
        self._seam = functools.lru_cache(maxsize=65_536)(self._find_seam)
        strings = [self._opening, self._closing, self._lead, self._ending]
        self.fingerprint = config.fingerprint({"strings": strings, "start": self._start_ids, "end": self.end_id})

    def halves(self, message: str) -> tuple[list[int], list[int]]:
        """The ids before and behind the speech of a filled message, up to where the answer begins.

        Raises:
            UserError: it has not exactly one ``{speech}``, the template changes it, or the speech's neighbours merge.
        """
        with self._one_at_a_time:
            prefix, suffix, _ = self._seam(message)
        return prefix.copy(), suffix.copy()

    def whole(self, message: str) -> list[int]:
        """The ids of a message without speech, up to where the answer begins.

        Raises:
            UserError: the template changes it, or it holds a special token.
        """
        self._require_plain(message, self.transcript_ids(message))
        return self._start_ids + self.transcript_ids(self._opening + self._unchanged(message) + self._closing)

    def transcript_ids(self, text: str) -> list[int]:
        """The ids of a text alone, without special tokens: what targets are."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def answers(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each answer as the template continues a prompt with it, closed by ``end_id``.

        Raises:
            UserError: an answer merges with the prompt's end.
        """
        wholes, given = [self._context + self._lead + text.strip() for text in texts], len(self._context_ids)
        rows = self.tokenizer(wholes, add_special_tokens=False)["input_ids"] if wholes else []
        for text, row in zip(texts, rows, strict=True):
            if row[:given] != self._context_ids:
                where = f"the prompt's end {self._context[-20:]!r} under {self._named}"
                raise UserError(
                    f"the answer {text!r} merges with {where}; name an LLM whose prompts end in a line break"
                )
            self._require_plain(text, [id for id in row[given:] if id not in self._lead_ids])
        return [[*row[given:], self.end_id] for row in rows]

    def prove(self, messages: Sequence[str], transcripts: Sequence[str]) -> None:
        """Show that every message's halves hold for every transcript, and for the transcript as the answer.

        Raises:
            UserError: they are not the ids of the chat string with the transcript in the speech's place.
        """
        for message in messages:
            prefix, suffix, joint = self._seam(message)
            before, behind = self._around(message)
            for text in transcripts:
                whole, prompt_ids = before + joint + text + behind, prefix + self.transcript_ids(text) + suffix
                same = self._start_ids + self.transcript_ids(whole) == prompt_ids
                if same and self._templated:
                    told_ids = [*self.transcript_ids(whole + self._lead + text.strip()), self.end_id]
                    same = told_ids == prompt_ids + self.answers([text])[0]
                if not same:
                    what = f"the tokens of {text!r} are not the same in it as alone under {self._named}"
                    remedy = f"put {SPEECH} alone on its line, last if transcripts end in punctuation"
                    raise UserError(f"prompt {message!r}: {what}; {remedy}")

    def _require_plain(self, text: str, ids: Sequence[int]) -> None:
        """What people wrote must not open or close the turns of a conversation."""
        if control := self._control_ids & set(ids):
            token = self._added[min(control)].content
            raise UserError(f"{text!r} holds {token!r}, a special token under {self._named}; take it out of the text")

    def _render(self, message: str, *answer: str) -> str:
        """The chat string of a message, asking for an answer, or of a message and its answer."""
        turns = [{"role": "user", "content": message}, *({"role": "assistant", "content": text} for text in answer)]
        # Without these a template may print today's date, so that tomorrow's ids are others, or leave it to the answer
        # to open a think block, which no target has. Templates that know neither ignore them.
        fixed = {"date_string": DATE, "enable_thinking": False, "chat_template": self._template}
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=not answer, **fixed))

    def _read_template(self) -> None:
        asked, told = self._render(PROBE), self._render(PROBE, PROBE)
        if asked.count(PROBE) != 1 or not told.startswith(asked) or told.count(PROBE) != 2:
            does = "does not print a message once, or continues a prompt otherwise than it asks for an answer"
            raise UserError(f"the chat template beside {self._named} {does}; name another LLM")
        self._opening, _, self._closing = asked.partition(PROBE)
        self._lead, _, self._ending = told.removeprefix(asked).partition(PROBE)

    def _find_end(self) -> int:
        """The first token of what stands behind an answer, if it is an added one and no white space; else eos."""
        ids = self.transcript_ids(self._ending)
        if ids and ids[0] in self._added and self._added[ids[0]].content.strip():
            return ids[0]
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"{self._named} names no token that ends an answer: set eos_token in tokenizer_config.json")
        return int(self.tokenizer.eos_token_id)

    def _find_context(self) -> str:
        """The least of a prompt's end that an answer's tokens depend on: what stands from its last added token on."""
        contents = [self._added[id].content for id in self.transcript_ids(self._closing) if id in self._added]
        return self._closing[max(0, self._closing.rfind(contents[-1])) :] if contents else self._closing

    def _around(self, message: str) -> tuple[str, str]:
        """The chat string before and behind the speech."""
        require_speech(message, "prompt")
        self._require_plain(message, self.transcript_ids(message.replace(SPEECH, PROBE)))
        before, _, behind = self._unchanged(message).partition(SPEECH)
        return self._opening + before, behind + self._closing

    def _unchanged(self, message: str) -> str:
        """A message as the template prints it: without outer white space, else as it is."""
        if self._templated:
            message = message.strip()
            if self._render(message) != self._opening + message + self._closing:
                raise UserError(f"prompt {message!r}: the chat template beside {self._named} changes it; reword it")
        return message

    def _find_seam(self, message: str) -> tuple[list[int], list[int], str]:
        """Prefix, suffix, and the joint: what must stand before the speech for its tokens to be the same as alone."""
        before, behind = self._around(message)
        probe_ids = self.transcript_ids(PROBE)
        for joint in ("", " "):  # a space where a text alone begins with one, as in SentencePiece
            ids = self.transcript_ids(before + joint + PROBE + behind)
            for at in range(len(ids) - len(probe_ids) + 1):
                end = at + len(probe_ids)
                if ids[at:end] == probe_ids:
                    return self._start_ids + ids[:at], ids[end:], joint
        what = f"what stands beside {SPEECH} merges with its tokens under {self._named}"
        raise UserError(f"prompt {message!r}: {what}; put {SPEECH} alone on its line")
