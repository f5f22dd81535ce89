"""The typed records that pass between rooms: read this file first, then any room alone.

Shape letters: B items, T encoder frames, L tokens, A answer tokens, E encoder width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray


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
class Unit:
    """What one actor call processes: consecutive rows of the manifest that become one part."""

    index: int
    utterances: tuple[Utterance, ...]

    @property
    def part(self) -> str:
        """The folder's name in the shard set, seven digits."""
        return f"part-{self.index:07d}"


@dataclass(frozen=True, slots=True)
class Quarantined:
    """An utterance that was not committed, and why."""

    id: str
    reason: str
    """A code: missing_audio, undecodable, truncated, empty_audio, silent, too_long, too_short, empty_text, non_finite,
    too_many_tokens."""
    detail: str
    attempts: int = 1


@dataclass(frozen=True, slots=True)
class Receipt:
    """What comes back from encoding a unit: never features."""

    part: str
    num_committed: int
    num_quarantined: int
    audio_s: float
    """By the manifest, quarantined utterances included."""
    encode_s: float
    """Wall seconds the unit took in its process."""


class MicroBatch(Protocol):
    """What a loader gives and an objective takes; engines only move it."""

    def to(self, device: torch.device) -> Self:
        """The same micro-batch with its tensors on a device."""


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
