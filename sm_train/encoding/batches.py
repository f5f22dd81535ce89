"""Which utterances of a unit go through the encoder together: a pure function of the manifest."""

from __future__ import annotations

from collections.abc import Sequence

from sm_train.data.audio import SAMPLE_RATE_HZ


def cut_batches(durations_s: Sequence[float], batch_s: float, equal_length: bool = False) -> list[list[int]]:
    """Indices in batches of like length whose padded length, count times longest, stays within ``batch_s`` seconds.

    Utterances are sorted by duration, those of one duration stay in order; one that is longer than ``batch_s`` is a
    batch alone.

    Args:
        equal_length: a batch holds utterances of one number of samples only.
    """
    order = sorted(range(len(durations_s)), key=lambda i: (durations_s[i], i))
    batches: list[list[int]] = []
    for i in order:
        new = not batches or durations_s[i] * (len(batches[-1]) + 1) > batch_s
        if not new and equal_length:
            first, this = (round(durations_s[j] * SAMPLE_RATE_HZ) for j in (batches[-1][0], i))
            new = first != this
        if new:
            batches.append([])
        batches[-1].append(i)
    return batches
