"""The typed records that pass between rooms: read this file first, then any room alone.

Shape letters: B items, T encoder frames, L tokens, A answer tokens, E encoder width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # processes that only decode audio do without it
    import torch


@dataclass(frozen=True, slots=True)
class Utterance:
    """One segment of audio with its text: a row of a manifest."""

    id: str
    audio: str
    """A path, relative to the manifest's folder unless it is absolute."""
    start_s: float
    duration_s: float
    text: str
    lang: str
    speaker: str
    split: str


@dataclass(frozen=True, slots=True)
class Task:
    """One instruction on an utterance: a row of an instructions file."""

    utterance_id: str
    task: str
    """asr | st | sqa"""
    variables: dict[str, str]
    """What the prompt's placeholders stand for, ``{"question": ...}`` for sqa."""
    target_lang: str
    answer: str


@dataclass(frozen=True, slots=True)
class Quarantined:
    """An utterance that was not committed, and why."""

    id: str
    reason: str
    """A code: missing_audio, undecodable, truncated, empty_audio, silent, too_long, too_short, too_large, empty_text,
    non_finite, times_out, crashes_decoder, crashes_encoder; in a target set empty_text, too_many_tokens."""
    detail: str
    attempts: int = 1


@dataclass(frozen=True, slots=True)
class Unit:
    """What one actor call processes: consecutive rows of the manifest that become one part."""

    index: int
    utterances: tuple[Utterance, ...]
    barred: tuple[Quarantined, ...] = ()
    """Those of its utterances that must not be touched, as they ended a process; they are quarantined so."""

    @property
    def part(self) -> str:
        """The folder's name in the shard set, seven digits."""
        return f"part-{self.index:07d}"


@dataclass(frozen=True, slots=True)
class Receipt:
    """What comes back from encoding a unit: never features."""

    part: str
    num_committed: int
    num_quarantined: int
    audio_s: float
    """By the manifest, quarantined utterances included."""
    encode_s: float
    """Seconds that the encoder was at work on it."""
    write_s: float
    wall_s: float
    """From the moment its process took it up, beside the units before it."""
    reasons: tuple[str, ...] = ()
    """Why utterances were quarantined, one code each."""
    worker: str = ""
    """The process that did it, host:pid."""


class MicroBatch(Protocol):
    """What a loader gives and an objective takes; engines only move it."""

    def to(self, device: torch.device) -> Self:
        """The same micro-batch with its tensors on a device."""

    def split(self, pieces: int) -> list[Self]:
        """Up to so many pieces of neighbouring items, each as wide as its longest item."""


class Batch(NamedTuple):
    """A micro-batch of stage 1: speech and its targets."""

    feats_BTE: torch.Tensor
    num_frames_B: torch.Tensor
    token_rows_BL: torch.Tensor
    """Rows of the target table, padded with the pad's row."""
    num_tokens_B: torch.Tensor
    ordinals: NDArray[np.int64]
    """The utterances' ordinals in the shard set, for messages and logs; stays on the host."""

    def to(self, device: torch.device) -> Batch:
        """The same micro-batch with its tensors on a device."""
        return Batch(
            self.feats_BTE.to(device, non_blocking=True),
            self.num_frames_B.to(device, non_blocking=True),
            self.token_rows_BL.to(device, non_blocking=True),
            self.num_tokens_B.to(device, non_blocking=True),
            self.ordinals,
        )

    def split(self, pieces: int) -> list[Batch]:
        """Up to so many pieces of neighbouring items, each as wide as its longest item."""
        if pieces == 1:
            return [self]
        split = []
        for rows in _pieces(len(self.ordinals), pieces):
            frames, tokens = self.num_frames_B[rows], self.num_tokens_B[rows]
            feats_BTE, token_rows_BL = (
                self.feats_BTE[rows, : int(frames.max())],
                self.token_rows_BL[rows, : int(tokens.max())],
            )
            split.append(Batch(feats_BTE, frames, token_rows_BL, tokens, self.ordinals[rows]))
        return split


class PromptedBatch(NamedTuple):
    """A micro-batch of stage 2: speech inside prompts, with the answers, left-padded so that answers end together."""

    speech: Batch
    ids_BL: torch.Tensor
    """Token ids of prefix, suffix and answer (but for its last token); any id where speech or nothing stands."""
    is_speech_BL: torch.Tensor
    """Where mapped positions are spliced in: as many in a row as the item has positions."""
    is_real_BL: torch.Tensor
    """False where the row is padding."""
    answer_ids_BA: torch.Tensor
    """What the last A positions are to predict, answer and end of turn; -100 where nothing is asked."""

    def to(self, device: torch.device) -> PromptedBatch:
        """The same micro-batch with its tensors on a device."""
        rest = (t.to(device, non_blocking=True) for t in self[1:])
        return PromptedBatch(self.speech.to(device), *rest)

    def split(self, pieces: int) -> list[PromptedBatch]:
        """Up to so many pieces of neighbouring items, each as wide as its longest item."""
        if pieces == 1:
            return [self]
        split = []
        for rows, speech in zip(_pieces(len(self.ids_BL), pieces), self.speech.split(pieces), strict=True):
            longest = int(self.is_real_BL[rows].sum(dim=1).max())
            longest_answer = int((self.answer_ids_BA[rows] >= 0).sum(dim=1).max())
            ids_BL, is_speech_BL, is_real_BL = (tensor[rows, -longest:] for tensor in self[1:4])
            answer_ids_BA = self.answer_ids_BA[rows, -longest_answer:]
            split.append(PromptedBatch(speech, ids_BL, is_speech_BL, is_real_BL, answer_ids_BA))
        return split


def _pieces(count: int, pieces: int) -> list[slice]:
    """Up to ``pieces`` runs of nearly equal size."""
    size = -(-count // pieces)
    return [slice(first, first + size) for first in range(0, count, size)]
