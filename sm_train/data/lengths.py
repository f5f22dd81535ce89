"""The arithmetic of lengths behind the encoder: its frames to stored frames to mapper positions."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

N = TypeVar("N", int, NDArray[np.int64])

FRAMES_PER_POSITION = 4
"""Two convolutions of stride 2: 25 Hz frames become 6.25 Hz positions."""


def pooled_frames(num_frames: int, pool: int) -> int:
    """Frames left after averaging every ``pool``; a last incomplete group is averaged alone."""
    return -(-num_frames // pool)


def num_positions(num_frames: N) -> N:
    """Mapper positions P of T stored frames: each convolution (kernel 6, stride 2, padding 2) halves exactly."""
    return num_frames // FRAMES_PER_POSITION
