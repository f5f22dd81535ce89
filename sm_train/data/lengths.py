"""The arithmetic of lengths: encoder frames to stored frames to mapper positions, in one place."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

N = TypeVar("N", int, NDArray[np.int64])

_WINDOW_SAMPLES, _HOP_SAMPLES, _STRIDE = 400, 160, 2
FRAMES_PER_POSITION = 4
"""Two convolutions of stride 2: 25 Hz frames become 6.25 Hz positions."""


def encoder_frames(num_samples: int) -> int:
    """Frames that SeamlessM4T's features give: windows of 25 ms every 10 ms, in whole pairs."""
    return max(1 + (num_samples - _WINDOW_SAMPLES) // _HOP_SAMPLES, 0) // _STRIDE


def shortest_samples(pool: int) -> int:
    """The fewest samples that make one position."""
    frames = (FRAMES_PER_POSITION - 1) * pool + 1
    return _WINDOW_SAMPLES + (frames * _STRIDE - 1) * _HOP_SAMPLES


def pooled_frames(num_frames: int, pool: int) -> int:
    """Frames left after averaging every ``pool``; a last incomplete group is averaged alone."""
    return -(-num_frames // pool)


def num_positions(num_frames: N) -> N:
    """Mapper positions P of T stored frames: each convolution (kernel 6, stride 2, padding 2) halves exactly."""
    return num_frames // FRAMES_PER_POSITION
