"""An LLM as judge of answers to questions: yes or no, read from the probabilities of its answer's first token.

No text is generated and none is parsed. Verdicts are kept in a file that only grows, so that nothing is asked twice.

Shape letters: B prompts, L tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sm_train import config, files
from sm_train.chat import Chat
from sm_train.errors import UserError
from sm_train.models import checkpoints
from sm_train.models.llm import FrozenLlm, LlmConfig
from sm_train.models.tokenizer import read_tokenizer, tokenizer_hash

PROMPT = """\
You grade the answers of a system to questions about a recording.
Question: {question}
Correct answer: {reference}
Answer of the system: {answer}
Does the answer of the system say the same as the correct answer? Other wording is no mistake. Say only yes or no."""
"""The default prompt; what it may hold: {question}, {reference}, {answer} and {context}, the transcript."""
YES, NO = ("yes", "Yes", "YES"), ("no", "No", "NO")
_HOLDS = ("question", "reference", "answer", "context")


@dataclass(frozen=True, slots=True)
class Claim:
    """What is judged: that an answer is right."""

    question: str
    reference: str
    answer: str
    context: str = ""
    """The transcript, where the prompt has {context}; else empty."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge says of a claim."""

    yes: float
    """P(yes) / (P(yes) + P(no)), each summed over the tokens that begin the word."""
    mass: float
    """P(yes) + P(no): near zero where the judge would rather say something else."""

    @property
    def right(self) -> bool:
        """Whether yes is likelier than no."""
        return self.yes > 0.5


UNASKED = Verdict(1.0, 0.0)
"""Of an answer that is the reference, where such are right without being asked."""


class Judge:
    """A causal LLM that says yes or no; its weights are loaded at the first question.

    Raises:
        UserError: the prompt lacks {reference} or {answer} or has another placeholder, the model is not there, or its
            tokenizer begins yes and no alike.
    """

    def __init__(self, cfg: LlmConfig, prompt: str = PROMPT) -> None:
        for name in re.findall(r"\{(\w+)\}", prompt):
            if name not in _HOLDS:
                raise UserError(f"the judge's prompt has {{{name}}}; it may have {{{'}, {'.join(_HOLDS)}}}")
        for name in ("reference", "answer"):
            if f"{{{name}}}" not in prompt:
                raise UserError(f"the judge's prompt has no {{{name}}}; without it there is nothing to judge")
        folder = checkpoints.resolve(cfg.path, cfg.revision, "judge")
        tokenizer = read_tokenizer(folder)
        self.cfg, self.prompt, self.chat = cfg, prompt, Chat(tokenizer)
        self.lead_ids, self.yes_ids, self.no_ids = first_tokens(self.chat, cfg.path)
        self._special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.facts: dict[str, str] = {
            "judge": cfg.path,
            "revision": str(cfg.revision),
            "hash": checkpoints.fingerprint(folder),
            "dtype": cfg.dtype,
            "tokenizer": tokenizer_hash(tokenizer),
            "chat": self.chat.fingerprint,
            "prompt": config.fingerprint({"prompt": prompt, "yes": YES, "no": NO}),
        }
        asked = {name: fact for name, fact in self.facts.items() if name not in ("judge", "revision")}
        self.fingerprint = config.fingerprint(asked)
        """A hash of all that a verdict follows from but the claim; the same weights in another folder have the same."""
        self._llm: FrozenLlm | None = None

    def key(self, claim: Claim) -> str:
        """What a verdict on this claim is kept under."""
        return hashlib.sha256(json.dumps([self.fingerprint, asdict(claim)], sort_keys=True).encode()).hexdigest()[:32]

    def ids(self, claim: Claim) -> list[int]:
        """The prompt as token ids, up to where yes or no stands.

        What people and systems wrote stays on its line and opens no turn: white space becomes one space, and so does
        a special token of the judge.
        """
        values = {name: self._tame(text) for name, text in asdict(claim).items()}
        return self.chat.whole(re.sub(r"\{(\w+)\}", lambda name: values[name[1]], self.prompt)) + self.lead_ids

    @torch.inference_mode()
    def ask(self, claims: Sequence[Claim]) -> list[Verdict]:
        """Verdicts on some claims, as one left-padded batch.

        Raises:
            UserError: the model cannot be loaded, or a prompt is longer than it was made for.
        """
        self._llm = llm = self._llm or FrozenLlm(self.cfg)
        rows = [self.ids(claim) for claim in claims]
        longest = max(map(len, rows))
        limit = getattr(llm.model.config.get_text_config(), "max_position_embeddings", None)
        if limit and longest > limit:
            worst = claims[max(range(len(rows)), key=lambda b: len(rows[b]))]
            raise UserError(
                f"judge {self.cfg.path} takes prompts of {limit} tokens, but the one about {worst.answer[:60]!r} has "
                f"{longest}; shorten the prompt or that answer"
            )
        ids_BL = torch.full((len(rows), longest), llm.end_ids[0])
        mask_BL = torch.zeros(len(rows), longest, dtype=torch.long)
        for b, row in enumerate(rows):
            ids_BL[b, longest - len(row) :], mask_BL[b, longest - len(row) :] = torch.tensor(row), 1
        places_BL = (mask_BL.cumsum(dim=1) - 1).clamp(min=0)
        logits_BV = llm.model(
            input_ids=ids_BL.to(llm.device), attention_mask=mask_BL.to(llm.device),
            position_ids=places_BL.to(llm.device), use_cache=False, logits_to_keep=1,
        ).logits[:, -1]  # fmt: skip
        chances_BV = logits_BV.double().softmax(dim=-1)
        yes_B, no_B = (chances_BV[:, ids].sum(dim=-1).tolist() for ids in (self.yes_ids, self.no_ids))
        return [_verdict(yes, no, self.cfg.path) for yes, no in zip(yes_B, no_B, strict=True)]

    def _tame(self, text: str) -> str:
        for token in self._special:
            text = text.replace(token, " ")
        return " ".join(text.split())


def _verdict(yes: float, no: float, path: str) -> Verdict:
    if not math.isfinite(yes + no) or yes + no <= 0:
        raise UserError(f"judge {path} gives neither yes nor no a chance ({yes}, {no}); try dtype float32 or another")
    return Verdict(yes / (yes + no), yes + no)


def first_tokens(chat: Chat, path: str) -> tuple[list[int], list[int], list[int]]:
    """(what stands before the answer's first word, the tokens that begin yes, those that begin no).

    Each word in three cases, as the template continues a prompt; where nothing stands before it also behind a space,
    as models without a template answer. Tokens that begin both words tell nothing and are left out.

    Raises:
        UserError: the tokenizer begins yes and no alike.
    """
    rows = [[ids[:-1] for ids in chat.answers(words)] for words in (YES, NO)]
    alike = [len(set(ids)) == 1 for ids in zip(*rows[0], *rows[1], strict=False)]
    lead = rows[0][0][: [*alike, False].index(False)]
    firsts = [{id for row in of for id in row[len(lead) :][:1]} for of in rows]
    if not lead:
        for words, of in zip((YES, NO), firsts, strict=True):
            of |= {chat.transcript_ids(f" {word}")[0] for word in words}
    yes_ids, no_ids = sorted(firsts[0] - firsts[1]), sorted(firsts[1] - firsts[0])
    if not yes_ids or not no_ids:
        raise UserError(f"judge {path}: its tokenizer begins yes and no with the same token; name another model")
    return lead, yes_ids, no_ids


class Verdicts:
    """Verdicts in a JSONL file that only grows; several judges, systems and processes may share it.

    A line that a killed process left half written is passed over; of two verdicts under one key the first one counts.

    Raises:
        UserError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Verdict] = {}
        self.damaged = 0
        """Lines that are no verdict."""
        try:
            lines = path.read_bytes().split(b"\n") if path.exists() else []
        except OSError as error:
            raise UserError(f"verdicts {path} cannot be read ({error.strerror}); name another cache") from None
        for line in filter(None, lines):
            try:
                kept = json.loads(line)
                key, yes, mass = str(kept["key"]), float(kept["yes"]), float(kept["mass"])
                if not (0 <= yes <= 1 and 0 < mass < 1.001):
                    raise ValueError(line)
            except (ValueError, KeyError, TypeError):
                self.damaged += 1
            else:
                self.known.setdefault(key, Verdict(yes, mass))

    def add(self, found: Mapping[str, tuple[Claim, Verdict]], judge: str) -> None:
        """Append verdicts by key, durably; ``judge`` is noted beside them, for people."""
        rows = [
            {"key": key, "judge": judge, **asdict(claim), "yes": verdict.yes, "mass": verdict.mass}
            for key, (claim, verdict) in found.items()
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
        with self.path.open("a+b", buffering=0) as file:  # one write: lines of several processes do not mix
            if file.tell():
                file.seek(-1, os.SEEK_END)
            # What a killed process left half written becomes a line of its own.
            rest = memoryview(b"\n" * (file.read(1) not in (b"", b"\n")) + lines)
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        files.sync(self.path.parent)
        self.known |= {key: verdict for key, (_, verdict) in found.items()}


def judge_all(
    judge: Judge, claims: Sequence[Claim], kept: Verdicts, batch_size: int,
    show: Callable[[int, int], Any] = lambda done, total: None,
) -> list[Verdict]:  # fmt: skip
    """The verdict on each claim: a kept one, or the judge's own, kept from then on; equal claims are asked once.

    ``show`` is told after each batch how many of how many questions were asked.
    """
    keys = [judge.key(claim) for claim in claims]
    new = {key: claim for key, claim in zip(keys, claims, strict=True) if key not in kept.known}
    order = sorted(new, key=lambda key: (sum(map(len, asdict(new[key]).values())), key))  # neighbours in length
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        verdicts = judge.ask([new[key] for key in batch])
        found = {key: (new[key], verdict) for key, verdict in zip(batch, verdicts, strict=True)}
        kept.add(found, f"{judge.cfg.path} {judge.fingerprint}")
        show(begin + len(batch), len(order))
    return [kept.known[key] for key in keys]
