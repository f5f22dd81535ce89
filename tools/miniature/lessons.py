"""What the miniature's LLM is taught: endless batches of exchanges, after a first lesson in copying.

Shape letters: B items, L tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from sm_train.config import key
from tools.miniature.chat import Encoder, Example, Prompts, examples_of
from tools.miniature.training import bucketed
from tools.miniature.world import World

FIRST_SHARES = {"asr": 0.4, "st": 0.4, "sqa": 0.2}
"""Shares of the tasks while copying is learnt."""
LATER_SHARES = {"asr": 0.1, "st": 0.6, "sqa": 0.3}
IGNORED = -100
POOL = 16


@dataclass(frozen=True)
class LlmConfig:
    """How the miniature's LLM is made."""

    start_from: str = key("", "folder of a checkpoint of the same shape to go on from; empty: from nothing")
    vocabulary: int = key(4096, "tokens of the tokenizer")
    tokenizer_sentences: int = key(20000, "sentences whose texts train the tokenizer")
    word_weight: int = key(3000, "extra occurrences of each English word in the tokenizer's texts")
    width: int = key(160, "hidden size")
    feed_forward: int = key(448, "width of the feed-forward layers")
    layers: int = key(4, "decoder layers")
    heads: int = key(4, "attention heads")
    max_length: int = key(512, "positions the model is made for")
    embedding_std: float = key(1.0, "spread of the embedding rows at the start")
    copy_steps: int = key(300, "first steps: random words, repeated, so that attention learns to copy")
    asr_steps: int = key(1000, "first steps with a large share of asr, those of copying included")
    steps: int = key(4000, "training steps, those of copying included")
    batch_size: int = key(32, "examples a step")
    learning_rate: float = key(2e-3, "peak of the one-cycle schedule")
    warm_up: float = key(0.03, "share of the steps in which the learning rate rises")
    variants: float = key(0.5, "share of examples whose prompt is a generated variant of the shipped ones")
    scrambled: float = key(0.6, "share of the asr examples whose transcript is random words, so that copying is learnt")
    padded: float = key(0.3, "share of examples whose transcript is followed by pad tokens")
    max_pads: int = key(20, "the most pad tokens behind a transcript")
    neftune_alpha: float = key(30.0, "uniform noise on input embeddings, alpha of NEFTune (arXiv 2310.05914)")
    bfloat16: bool = key(False, "autocast matrix products in training")
    check_every: int = key(300, "steps between looks at exact match")
    practice_steps: int = key(2000, "steps of the second training, from the first one's fp16 weights, all tasks alike")
    practice_rate: float = key(1.5e-3, "peak of the second training's schedule")
    practice_st: float = key(0.45, "share of translation in the second training; the rest is asr and sqa, six to five")
    test_sentences: int = key(200, "held-out sentences of the final evaluation")


class Batch(NamedTuple):
    """Examples of one step, padded on the right."""

    ids_BL: torch.Tensor
    mask_BL: torch.Tensor
    labels_BL: torch.Tensor


def lessons(
    config: LlmConfig, world: World, prompts: Prompts, encoder: Encoder, rng: np.random.Generator
) -> Iterator[Batch]:
    """The first training: copying, then the tasks, the hardest ones more and more."""
    word_ids = np.array([encoder.ids(f" {word}")[0] for word in sorted(world.word_types())])
    for _ in range(config.copy_steps):
        yield _repeated(rng, config.batch_size, word_ids)
    for step in itertools.count(config.copy_steps, POOL):
        shares = FIRST_SHARES if step < config.asr_steps else LATER_SHARES
        yield from _pool(config, world, prompts, encoder, shares, rng)


def practice(
    config: LlmConfig, world: World, prompts: Prompts, encoder: Encoder, rng: np.random.Generator
) -> Iterator[Batch]:
    """The second training: all tasks, endlessly."""
    rest = 1 - config.practice_st
    shares = {"asr": rest * 6 / 11, "st": config.practice_st, "sqa": rest * 5 / 11}
    while True:
        yield from _pool(config, world, prompts, encoder, shares, rng)


def _pool(
    config: LlmConfig,
    world: World,
    prompts: Prompts,
    encoder: Encoder,
    shares: dict[str, float],
    rng: np.random.Generator,
) -> list[Batch]:
    """POOL batches of fresh examples, each of neighbours in length."""
    words = sorted(world.word_types())
    pairs = []
    for _ in range(POOL * config.batch_size):
        example = _draw(config, world, prompts, words, str(rng.choice(list(shares), p=list(shares.values()))), rng)
        num_pads = int(rng.integers(1, config.max_pads + 1)) if rng.random() < config.padded else 0
        pairs.append((encoder.prompt_ids(example, num_pads), encoder.answer_ids(example)))
    lengths = np.array([len(prompt) + len(answer) for prompt, answer in pairs])
    return [_collate([pairs[row] for row in rows]) for rows in bucketed(lengths, config.batch_size, rng)]


def _draw(
    config: LlmConfig, world: World, prompts: Prompts, words: list[str], task: str, rng: np.random.Generator
) -> Example:
    """One training example of a task."""
    prompt = prompts.sample(rng, task, config.variants)
    if task == "asr" and rng.random() < config.scrambled:
        text = " ".join(rng.choice(words, size=int(rng.integers(3, 13))))
        return Example(task, prompt, text, text)
    return examples_of(world.sample(rng, "train"), task, prompt, int(rng.integers(1 << 16)))


def _repeated(rng: np.random.Generator, batch_size: int, word_ids: np.ndarray[Any, Any]) -> Batch:
    """Random words said again and again: the densest lesson in copying, with loss on every repetition."""
    ids_BL = np.empty((batch_size, 64), dtype=np.int64)
    labels_BL = np.full_like(ids_BL, IGNORED)
    for ids_L, labels_L in zip(ids_BL, labels_BL, strict=True):
        period = int(rng.integers(4, 25))
        ids_L[:] = np.resize(rng.choice(word_ids, size=period), len(ids_L))
        labels_L[period:] = ids_L[period:]
    return Batch(torch.from_numpy(ids_BL), torch.ones(ids_BL.shape, dtype=torch.long), torch.from_numpy(labels_BL))


def _collate(pairs: list[tuple[list[int], list[int]]]) -> Batch:
    width = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids_BL = torch.zeros(len(pairs), width, dtype=torch.long)
    mask_BL = torch.zeros_like(ids_BL)
    labels_BL = torch.full_like(ids_BL, IGNORED)
    for row, (prompt, answer) in enumerate(pairs):
        length = len(prompt) + len(answer)
        ids_BL[row, :length] = torch.tensor(prompt + answer)
        mask_BL[row, :length] = 1
        labels_BL[row, len(prompt) : length] = torch.tensor(answer)
    return Batch(ids_BL, mask_BL, labels_BL)
