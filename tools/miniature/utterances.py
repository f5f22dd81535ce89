"""What the miniature's speech encoder is taught: utterances as its input features, in endless batches.

Shape letters: B items, S samples, T encoder frames, E feature width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import SeamlessM4TFeatureExtractor

from sm_train.config import fingerprint, key, to_mapping
from tools.miniature.ctc import CtcBatch
from tools.miniature.speech import SAMPLE_RATE_HZ, Voice, utter
from tools.miniature.training import bucketed
from tools.miniature.world import World

Feats = np.ndarray[Any, np.dtype[np.float16]]


@dataclass(frozen=True)
class SpeechConfig:
    """What every speech encoder of the miniature has: its shape, and the utterances it hears."""

    width: int = key(144, "hidden size")
    feed_forward: int = key(576, "width of the feed-forward layers")
    layers: int = key(4, "conformer layers")
    heads: int = key(4, "attention heads")
    kernel: int = key(31, "frames of the causal depthwise convolution")
    utterances: int = key(9000, "training utterances")
    test_utterances: int = key(300, "held-out sentences, with known voices and with held-out ones")
    noisy: float = key(0.2, "share of training utterances with white noise")
    min_snr_db: float = key(5.0, "the strongest noise")
    max_snr_db: float = key(30.0, "the weakest noise")
    test_snr_db: float | None = key(None, "white noise on the test utterances; null for clean speech")
    batch_size: int = key(24, "utterances a step")
    warm_up: float = key(0.1, "share of the steps in which the learning rate rises")
    bfloat16: bool = key(True, "autocast matrix products in training")
    check_every: int = key(300, "steps between looks at how well it does")


@dataclass(frozen=True)
class EncoderConfig(SpeechConfig):
    """How the miniature's speech encoder is made."""

    start_from: str = key("", "folder of a checkpoint of the same shape to go on from; empty: from nothing")
    letter_steps: int = key(1600, "training steps of the first lesson, characters; 0 to go on with the second")
    word_steps: int = key(900, "training steps of the second lesson, characters and words")
    word_weight: float = key(0.5, "weight of the words' loss beside the characters'")
    learning_rate: float = key(2e-3, "peak of the first lesson's one-cycle schedule; the second's is three quarters")


@dataclass(frozen=True)
class Speech:
    """Utterances as the encoder's input features."""

    feats: list[Feats]
    texts: list[str]

    def batch(self, rows: np.ndarray[Any, Any]) -> CtcBatch:
        """Padded features of some utterances."""
        lengths = [len(self.feats[row]) for row in rows]
        feats_BTE = torch.zeros(len(rows), max(lengths), self.feats[rows[0]].shape[1])
        mask_BT = torch.zeros(len(rows), max(lengths), dtype=torch.long)
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            feats_BTE[index, :length] = torch.from_numpy(self.feats[row].astype(np.float32))
            mask_BT[index, :length] = 1
        return CtcBatch(feats_BTE, mask_BT, [self.texts[row] for row in rows])


def batches_of(config: SpeechConfig, speech: Speech, rng: np.random.Generator) -> Iterator[CtcBatch]:
    """Epoch after epoch, with two spans of time and two bands of frequency blanked (SpecAugment)."""
    for batch in plain_batches_of(config, speech, rng):
        bins = batch.feats_BTE.view(len(batch.texts), -1, 2, batch.feats_BTE.shape[2] // 2)
        for item in bins:
            for _ in range(2):
                start, band = rng.integers(len(item)), rng.integers(bins.shape[3])
                item[start : start + rng.integers(10)] = 0.0
                item[..., band : band + rng.integers(12)] = 0.0
        yield batch


def plain_batches_of(config: SpeechConfig, speech: Speech, rng: np.random.Generator) -> Iterator[CtcBatch]:
    """Epoch after epoch, as it was heard."""
    lengths = np.array([len(feats) for feats in speech.feats])
    while True:
        for rows in bucketed(lengths, config.batch_size, rng):
            yield speech.batch(rows)


def speech_of(
    config: SpeechConfig, world: World, split: str, voices: tuple[Voice, ...], count: int, seed: int, cache: Path
) -> Speech:
    """Features of ``count`` utterances, from the cache where they were computed before."""
    asked = {"split": split, "voices": [voice.name for voice in voices], "count": count, "seed": seed}
    asked |= {"world": to_mapping(world.config), "words": sorted(world.word_types()), "test_snr_db": config.test_snr_db}
    asked |= {"noisy": config.noisy, "min_snr_db": config.min_snr_db, "max_snr_db": config.max_snr_db}
    path = cache / f"{fingerprint(asked)}.npz"
    if not path.is_file():
        rng = np.random.default_rng([seed, len(voices), split == "train"])
        _synthesise_all(config, world, split, voices, count, rng, path)
    with np.load(path) as arrays:
        ends = np.cumsum(arrays["lengths"])
        return Speech(np.split(arrays["feats"], ends[:-1]), json.loads(str(arrays["texts"])))


def _noise(config: SpeechConfig, split: str, rng: np.random.Generator) -> float | None:
    """The signal-to-noise ratio in dB of one utterance; None is clean. Every utterance takes one draw at least."""
    noisy = rng.random() < config.noisy
    if split != "train":
        return config.test_snr_db
    return float(rng.uniform(config.min_snr_db, config.max_snr_db)) if noisy else None


def _synthesise_all(
    config: SpeechConfig,
    world: World,
    split: str,
    voices: tuple[Voice, ...],
    count: int,
    rng: np.random.Generator,
    path: Path,
) -> None:
    extractor = SeamlessM4TFeatureExtractor()
    feats: list[Feats] = []
    texts: list[str] = []
    for index in range(count):
        text = world.sample(rng, split).text
        snr_db = _noise(config, split, rng)
        audio_S = utter(text, voices[index % len(voices)], rng, snr_db)
        made = extractor(audio_S, sampling_rate=SAMPLE_RATE_HZ, return_tensors="np")
        feats.append(made["input_features"][0][: int(made["attention_mask"].sum())].astype(np.float16))
        texts.append(text)
        if (index + 1) % 1000 == 0:
            print(f"encoder: {index + 1}/{count} utterances of {split}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    lengths = np.array([len(item) for item in feats])
    np.savez(path, feats=np.concatenate(feats), lengths=lengths, texts=np.array(json.dumps(texts)))
