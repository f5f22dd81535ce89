"""The miniature's speech encoder: a tiny SeamlessM4T-v2 conformer, trained by CTC on the miniature's speech.

Two lessons: characters first, then characters and whole words together, so that a frame's features say which word they
belong to, as those of a large encoder do. The head of characters is kept for the cascade, that of words is not.

What is trained and later used is ``hidden_states[layers]`` as transformers 4 gave it, the conformer's output behind its
last layer norm and before the adaptor: ``encoder(feature_projection(feats))``. The adaptor is there for the format.
Shape letters: B items, T encoder frames, P pooled frames, E encoder width, V labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import SeamlessM4TFeatureExtractor, SeamlessM4Tv2Config
from transformers.models.seamless_m4t_v2.modeling_seamless_m4t_v2 import SeamlessM4Tv2SpeechEncoder

from tools.miniature.ctc import BLANK, CtcBatch, CtcHead, pool_pairs, word_error_rate
from tools.miniature.speech import HELD_OUT_VOICES, TRAIN_VOICES
from tools.miniature.training import Row, bucketed, fit, score_row
from tools.miniature.utterances import EncoderConfig, Speech, SpeechConfig, batches_of, speech_of
from tools.miniature.world import World

PREFIX = "speech_encoder."


def build_encoder(config: EncoderConfig, world: World, folder: Path, cache: Path, seed: int) -> list[Row]:
    """Synthesise, train, write to ``folder`` in fp16, and score what was written."""
    train = speech_of(config, world, "train", TRAIN_VOICES, config.utterances, seed, cache)
    known = speech_of(config, world, "test", TRAIN_VOICES, config.test_utterances, seed, cache)
    held_out = speech_of(config, world, "test", HELD_OUT_VOICES, config.test_utterances, seed, cache)
    torch.manual_seed(seed)
    batches = batches_of(config, train, np.random.default_rng(seed))
    minutes = 0.0
    if config.start_from:
        encoder, head = load_encoder(Path(config.start_from)), CtcHead.read(Path(config.start_from))
    else:
        encoder, head = new_encoder(config), CtcHead(config.width)
    if config.letter_steps:
        minutes = _lesson("letters", config, config.letter_steps, encoder, head, [], batches, known)
        _save(encoder, head, folder)
        encoder, head = load_encoder(folder), CtcHead.read(folder)
    words = CtcHead(config.width, [BLANK, *sorted(world.word_types())], " ")
    minutes += _lesson("words", config, config.word_steps, encoder, head, [words], batches, known)
    _save(encoder, head, folder)
    encoder, head = load_encoder(folder), CtcHead.read(folder)
    steps = config.letter_steps + config.word_steps
    rows = [
        score_row("encoder", "parameters, adaptor included", "count", encoder.num_parameters(), 1),
        score_row("encoder", f"training, {steps} steps", "minutes", minutes, steps),
    ]
    for voices, speech in (("known", known), ("held-out", held_out)):
        rate, low, high = _error_rate(encoder, head, speech, config.test_utterances)
        print(f"encoder, {voices} voices: word error rate {rate:.3f}", flush=True)
        rows.append(score_row(f"encoder + CTC, {voices} voices", "asr", "wer", rate, config.test_utterances, low, high))
    return rows


def _lesson(
    name: str,
    config: EncoderConfig,
    steps: int,
    encoder: SeamlessM4Tv2SpeechEncoder,
    head: CtcHead,
    more_heads: list[CtcHead],
    batches: Iterator[CtcBatch],
    known: Speech,
) -> float:
    """Train the encoder up to its adaptor with its heads; the minutes it took."""
    trained = torch.nn.ModuleList([encoder.feature_projection, encoder.encoder, head, *more_heads])
    print(f"encoder, {name}: {sum(p.numel() for p in trained.parameters()):,} trained parameters", flush=True)

    def loss_of(batch: CtcBatch) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16):
            pooled_BPE, lengths_B = pooled(encoder, batch)
            scores = [scorer(pooled_BPE) for scorer in (head, *more_heads)]
        losses = [h.loss(s, lengths_B, batch.texts) for h, s in zip((head, *more_heads), scores, strict=True)]
        return losses[0] + config.word_weight * sum(losses[1:], torch.zeros(()))

    return fit(
        f"encoder, {name}",
        trained,
        batches,
        loss_of,
        steps,
        config.learning_rate * (0.75 if more_heads else 1.0),
        config.warm_up,
        lambda step: f"word error rate {_error_rate(encoder, head, known, 100)[0]:.3f}",
        config.check_every,
    )


def load_encoder(folder: Path) -> SeamlessM4Tv2SpeechEncoder:
    """The encoder in a folder as :func:`build_encoder` writes it, in fp32, for inference."""
    encoder = SeamlessM4Tv2SpeechEncoder.from_pretrained(folder, dtype=torch.float32, key_mapping={rf"^{PREFIX}": ""})
    return encoder.requires_grad_(True).eval()


def pooled(encoder: SeamlessM4Tv2SpeechEncoder, batch: CtcBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Features at 25 Hz [B, P, E] and their lengths."""
    hidden_BTE = encoder.encoder(encoder.feature_projection(batch.feats_BTE), attention_mask=batch.mask_BT)
    return pool_pairs(hidden_BTE, batch.mask_BT)


@torch.no_grad()
def _error_rate(
    encoder: SeamlessM4Tv2SpeechEncoder, head: CtcHead, speech: Speech, count: int
) -> tuple[float, float, float]:
    references: list[str] = []
    hypotheses: list[str] = []
    lengths = np.array([len(feats) for feats in speech.feats[:count]])
    for rows in bucketed(lengths, 25, np.random.default_rng(0)):
        batch = speech.batch(rows)
        pooled_BPE, lengths_B = pooled(encoder, batch)
        hypotheses += head.texts(head(pooled_BPE), lengths_B)
        references += batch.texts
    return word_error_rate(references, hypotheses)


def new_encoder(config: SpeechConfig) -> SeamlessM4Tv2SpeechEncoder:
    """The real checkpoint's fields at small sizes; its other parts are never built, and tiny if someone does."""
    tiny: dict[str, Any] = {
        "vocab_size": 64,
        "t2u_vocab_size": 64,
        "char_vocab_size": 64,
        "unit_hifi_gan_vocab_size": 64,
    }
    for part in ("encoder", "decoder", "t2u_encoder", "t2u_decoder"):
        tiny |= {f"{part}_layers": 1, f"{part}_ffn_dim": 64, f"{part}_attention_heads": config.heads}
    values = SeamlessM4Tv2Config(
        architectures=["SeamlessM4Tv2Model"],
        hidden_size=config.width,
        speech_encoder_layers=config.layers,
        speech_encoder_attention_heads=config.heads,
        speech_encoder_intermediate_size=config.feed_forward,
        speech_encoder_dropout=0.0,
        speech_encoder_layerdrop=0.0,
        conv_depthwise_kernel_size=config.kernel,
        add_adapter=True,
        adaptor_kernel_size=2,
        adaptor_stride=2,
        **tiny,
    )
    return SeamlessM4Tv2SpeechEncoder(values)


def _save(encoder: SeamlessM4Tv2SpeechEncoder, head: CtcHead, folder: Path) -> None:
    save_encoder(encoder, folder)
    head.save(folder)


def save_encoder(encoder: SeamlessM4Tv2SpeechEncoder, folder: Path) -> None:
    """The speech encoder's part of a checkpoint of SeamlessM4Tv2Model, in fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + name: tensor.half().contiguous() for name, tensor in encoder.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    encoder.config.dtype = torch.float16
    encoder.config.architectures = ["SeamlessM4Tv2Model"]
    encoder.config.save_pretrained(folder)
    SeamlessM4TFeatureExtractor().save_pretrained(folder)
