"""A unit under way, and what the set's table will say of its utterances."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sm_train.data.audio import SAMPLE_RATE_HZ
from sm_train.records import Quarantined, Receipt, Unit, Utterance


class Abandoned(Exception):
    """A unit was given up before its end, because its encoder was closed."""


@dataclass(eq=False)
class Job:
    """One unit under way."""

    unit: Unit
    future: Future[Receipt]
    is_probe: bool
    barred: dict[str, Quarantined]
    batches_left: int = 0
    stored: dict[int, NDArray[np.float16]] = field(default_factory=dict)
    num_samples: dict[int, int] = field(default_factory=dict)
    bad: dict[int, Quarantined] = field(default_factory=dict)
    bytes: int = 0
    busy_s: float = 0.0
    begun: float = field(default_factory=time.perf_counter)

    @property
    def audio_s(self) -> float:
        return sum(u.duration_s for u in self.unit.utterances)


def row_of(utterance: Utterance, num_samples: int, num_frames: int) -> dict[str, object]:
    """What the set's table says of a committed utterance."""
    return {
        "id": utterance.id,
        "split": utterance.split,
        "lang": utterance.lang,
        "speaker": utterance.speaker,
        "duration_s": num_samples / SAMPLE_RATE_HZ,
        "num_frames": num_frames,
        "text": utterance.text,
        "audio": utterance.audio,
        "start_s": utterance.start_s,
    }
