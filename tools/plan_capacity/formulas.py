"""Closed formulas of work, bytes and time, one a function, each with its source.

P: parameters; T: tokens or frames; W: ranks. Seconds are wall seconds of one GPU unless said otherwise.
"""

from __future__ import annotations

import math

ENCODER_HZ = 50.0
FEATURE_BYTES = 2
"""float16."""
ADAM_BYTES = 30
"""Read and written for a parameter in one fused AdamW update: fp32 master, two moments and gradient in, three out, and
the half-precision weight."""
CHECKPOINT_BYTES = 12
"""Of a parameter: fp32 weight and both Adam moments (DESIGN section 4)."""


def encoder_flop_per_s(parameters: float, layers: int, width: int, utterance_s: float) -> float:
    """FLOPs of encoding one second of audio: f (2 P + 6 T d L), f = 50 Hz, T = f x utterance.

    2 P is a multiplication and an addition for each weight of a frame; 6 T d L is attention: scores, values and the
    relative-key term, 2 T d each. 0.245 PFLOP an audio hour for P = 635M, L = 24, d = 1024 and 12.3 s.
    """
    return ENCODER_HZ * (2 * parameters + 6 * ENCODER_HZ * utterance_s * width * layers)


def mapper_flop_per_s(first: float, rest: float, frame_hz: float) -> float:
    """FLOPs of training on one second of audio, forward and backward: 6 (P1 f / 2 + P2 f / 4).

    The first block sees every second frame, what follows every fourth. Forward 2, backward 4 for each parameter and
    position (Kaplan et al., arXiv 2001.08361). With the paper's exact split of 58.8M and 218.2M at 25 Hz it is 12.6
    GFLOP; with two equal halves of 138.5M it would be 15.6.
    """
    return 6 * (first * frame_hz / 2 + rest * frame_hz / 4)


def times_real_time(flop_per_s: float, flop_per_audio_s: float) -> float:
    """RTFx: seconds of audio in a second of work."""
    return flop_per_s / flop_per_audio_s


def feature_bytes_per_s(frame_hz: float, width: int) -> float:
    """Stored bytes of a second of audio: 51.2 kB at 25 Hz and 1024, 184 MB an hour."""
    return frame_hz * width * FEATURE_BYTES


def adam_s(parameters: float, memory_bytes_s: float) -> float:
    """The least an AdamW update takes: 30 bytes a parameter through the GPU's memory."""
    return ADAM_BYTES * parameters / memory_bytes_s


def all_reduce_s(num_bytes: float, ranks: int, link_bytes_s: float) -> float:
    """A ring's all-reduce: every rank sends and receives 2 (W - 1) / W of the bytes (Patarasuk and Yuan, 2009)."""
    return 2 * (ranks - 1) / ranks * num_bytes / link_bytes_s


def decoding_s(weight_bytes: float, memory_bytes_s: float, least_s: float) -> float:
    """One token of every answer of a batch: all weights are read once, in no less than ``least_s`` of launches."""
    return max(weight_bytes / memory_bytes_s, least_s)


def break_even_epochs(encode_gpu_hours: float, price_per_gpu_hour: float, storage: float) -> float:
    """Epochs at which storing features costs as much as encoding again in every epoch.

    Storing pays one pass and the storage, re-encoding one pass an epoch: 1 + storage / pass. Above it, storing wins.
    Without prices (a pass costs nothing) the storage is left out: one epoch.
    """
    encoding = encode_gpu_hours * price_per_gpu_hour
    return 1 + storage / encoding if encoding else 1.0


def best_interval_s(stall_s: float, mean_s: float) -> float:
    """Seconds between checkpoints that lose least: sqrt(2 d M) (Young, 1974)."""
    return math.sqrt(2 * stall_s * mean_s)


def goodput(interval_s: float, stall_s: float, outage_s: float, mean_s: float) -> float:
    """Share of wall time that trains, to first order: 1 - d / I - I / (2 M) - R / M.

    d: stall of a checkpoint; I: training between two; R: detection and restart; M: mean time between faults. It counts
    each loss as if it stood alone, so it is good where I, d and R are far below M, and may be below zero elsewhere.
    """
    return 1 - stall_s / interval_s - interval_s / (2 * mean_s) - outage_s / mean_s


def goodput_exact(interval_s: float, stall_s: float, survived: float, mean_s: float) -> float:
    """The same for exponential times between faults at any density (after Daly, 2006).

    Between two faults (M seconds on average) the restart is got through with the probability ``survived``, E[exp(-R /
    M)], and 1 / (exp((I + d) / M) - 1) intervals are then finished on average.
    """
    return interval_s / mean_s * survived / math.expm1((interval_s + stall_s) / mean_s)
