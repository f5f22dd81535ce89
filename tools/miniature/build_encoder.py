"""The miniature's speech encoder: a tiny SeamlessM4T-v2 conformer, trained by CTC on the miniature's speech.

What is trained and later used is ``hidden_states[layers]`` as transformers 4 gave it, the conformer's output behind its
last layer norm and before the adaptor: ``encoder(feature_projection(feats))``. The adaptor is there for the format.
Shape letters: B items, S samples, T encoder frames, E encoder width, V characters.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import SeamlessM4TFeatureExtractor, SeamlessM4Tv2Config
from transformers.models.seamless_m4t_v2.modeling_seamless_m4t_v2 import SeamlessM4Tv2SpeechEncoder

from sm_train.config import fingerprint, key
from tools.miniature.ctc import CtcBatch, CtcHead, ctc_of, greedy_texts, pool_pairs, word_error_rate
from tools.miniature.speech import HELD_OUT_VOICES, SAMPLE_RATE_HZ, TRAIN_VOICES, Voice, utter
from tools.miniature.training import Row, bucketed, fit, score_row
from tools.miniature.world import World

PREFIX = "speech_encoder."
Feats = np.ndarray[Any, np.dtype[np.float16]]


@dataclass(frozen=True)
class EncoderConfig:
    """How the miniature's speech encoder is made."""

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
    steps: int = key(1600, "training steps")
    batch_size: int = key(24, "utterances a step")
    learning_rate: float = key(2e-3, "peak of the one-cycle schedule")
    warm_up: float = key(0.15, "share of the steps in which the learning rate rises")
    bfloat16: bool = key(True, "autocast matrix products in training")
    check_every: int = key(300, "steps between looks at the word error rate")


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


def build_encoder(config: EncoderConfig, world: World, folder: Path, cache: Path, seed: int) -> list[Row]:
    """Synthesise, train, write to ``folder`` in fp16, and score what was written."""
    train = _speech(config, world, "train", TRAIN_VOICES, config.utterances, seed, cache)
    known = _speech(config, world, "test", TRAIN_VOICES, config.test_utterances, seed, cache)
    held_out = _speech(config, world, "test", HELD_OUT_VOICES, config.test_utterances, seed, cache)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    encoder, head = SeamlessM4Tv2SpeechEncoder(_encoder_config(config)), CtcHead(config.width)
    trained = torch.nn.ModuleList([encoder.feature_projection, encoder.encoder, head])
    print(f"encoder: {sum(p.numel() for p in trained.parameters()):,} trained parameters", flush=True)

    def loss_of(batch: CtcBatch) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16):
            scores_BPV, lengths_B = score(encoder, head, batch)
        return ctc_of(scores_BPV, lengths_B, batch.texts)

    minutes = fit(
        "encoder",
        trained,
        _batches(config, train, rng),
        loss_of,
        config.steps,
        config.learning_rate,
        config.warm_up,
        lambda step: f"word error rate {_error_rate(encoder, head, known, 100)[0]:.3f}",
        config.check_every,
    )
    _save(encoder, head, folder)
    encoder, head = load_encoder(folder), CtcHead.read(folder)
    rows = [
        score_row("encoder", "parameters, adaptor included", "count", encoder.num_parameters(), 1),
        score_row("encoder", f"training, {config.steps} steps", "minutes", minutes, config.steps),
    ]
    for voices, speech in (("known", known), ("held-out", held_out)):
        rate, low, high = _error_rate(encoder, head, speech, config.test_utterances)
        print(f"encoder, {voices} voices: word error rate {rate:.3f}", flush=True)
        rows.append(score_row(f"encoder + CTC, {voices} voices", "asr", "wer", rate, config.test_utterances, low, high))
    return rows


def load_encoder(folder: Path) -> SeamlessM4Tv2SpeechEncoder:
    """The encoder in a folder as :func:`build_encoder` writes it, in fp32, for inference."""
    encoder = SeamlessM4Tv2SpeechEncoder.from_pretrained(folder, dtype=torch.float32, key_mapping={rf"^{PREFIX}": ""})
    return encoder.eval()


def score(encoder: SeamlessM4Tv2SpeechEncoder, head: CtcHead, batch: CtcBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Character scores and their lengths."""
    hidden_BTE = encoder.encoder(encoder.feature_projection(batch.feats_BTE), attention_mask=batch.mask_BT)
    pooled_BPE, lengths_B = pool_pairs(hidden_BTE, batch.mask_BT)
    return head(pooled_BPE), lengths_B


@torch.no_grad()
def _error_rate(
    encoder: SeamlessM4Tv2SpeechEncoder, head: CtcHead, speech: Speech, count: int
) -> tuple[float, float, float]:
    references: list[str] = []
    hypotheses: list[str] = []
    lengths = np.array([len(feats) for feats in speech.feats[:count]])
    for rows in bucketed(lengths, 25, np.random.default_rng(0)):
        batch = speech.batch(rows)
        hypotheses += greedy_texts(*score(encoder, head, batch))
        references += batch.texts
    return word_error_rate(references, hypotheses)


def _batches(config: EncoderConfig, speech: Speech, rng: np.random.Generator) -> Iterator[CtcBatch]:
    """Epoch after epoch, with two spans of time and two bands of frequency blanked (SpecAugment)."""
    lengths = np.array([len(feats) for feats in speech.feats])
    while True:
        for rows in bucketed(lengths, config.batch_size, rng):
            batch = speech.batch(rows)
            bins = batch.feats_BTE.view(len(rows), -1, 2, batch.feats_BTE.shape[2] // 2)
            for item in bins:
                for _ in range(2):
                    start, band = rng.integers(len(item)), rng.integers(bins.shape[3])
                    item[start : start + rng.integers(10)] = 0.0
                    item[..., band : band + rng.integers(12)] = 0.0
            yield batch


def _speech(
    config: EncoderConfig, world: World, split: str, voices: tuple[Voice, ...], count: int, seed: int, cache: Path
) -> Speech:
    """Features of ``count`` utterances, from the cache where they were computed before."""
    noisy = config.noisy if split == "train" else 0.0
    asked = {"split": split, "voices": [voice.name for voice in voices], "count": count, "seed": seed, "noisy": noisy}
    asked |= {"min_snr_db": config.min_snr_db, "max_snr_db": config.max_snr_db, "words": sorted(world.word_types())}
    path = cache / f"{fingerprint(asked)}.npz"
    if not path.is_file():
        rng = np.random.default_rng([seed, len(voices), split == "train"])
        _synthesise_all(config, world, split, voices, count, noisy, rng, path)
    with np.load(path) as arrays:
        ends = np.cumsum(arrays["lengths"])
        return Speech(np.split(arrays["feats"], ends[:-1]), json.loads(str(arrays["texts"])))


def _synthesise_all(
    config: EncoderConfig,
    world: World,
    split: str,
    voices: tuple[Voice, ...],
    count: int,
    noisy: float,
    rng: np.random.Generator,
    path: Path,
) -> None:
    extractor = SeamlessM4TFeatureExtractor()
    feats: list[Feats] = []
    texts: list[str] = []
    for index in range(count):
        text = world.sample(rng, split).text
        snr_db = float(rng.uniform(config.min_snr_db, config.max_snr_db)) if rng.random() < noisy else None
        audio_S = utter(text, voices[index % len(voices)], rng, snr_db)
        made = extractor(audio_S, sampling_rate=SAMPLE_RATE_HZ, return_tensors="np")
        feats.append(made["input_features"][0][: int(made["attention_mask"].sum())].astype(np.float16))
        texts.append(text)
        if (index + 1) % 1000 == 0:
            print(f"encoder: {index + 1}/{count} utterances of {split}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    lengths = np.array([len(item) for item in feats])
    np.savez(path, feats=np.concatenate(feats), lengths=lengths, texts=np.array(json.dumps(texts)))


def _encoder_config(config: EncoderConfig) -> SeamlessM4Tv2Config:
    """The real checkpoint's fields at small sizes; its other parts are never built, and tiny if someone does."""
    tiny: dict[str, Any] = {
        "vocab_size": 64,
        "t2u_vocab_size": 64,
        "char_vocab_size": 64,
        "unit_hifi_gan_vocab_size": 64,
    }
    for part in ("encoder", "decoder", "t2u_encoder", "t2u_decoder"):
        tiny |= {f"{part}_layers": 1, f"{part}_ffn_dim": 64, f"{part}_attention_heads": config.heads}
    return SeamlessM4Tv2Config(
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


def _save(encoder: SeamlessM4Tv2SpeechEncoder, head: CtcHead, folder: Path) -> None:
    """The speech encoder's part of a checkpoint of SeamlessM4Tv2Model, in fp16, and the CTC head beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + name: tensor.half().contiguous() for name, tensor in encoder.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    encoder.config.dtype = torch.float16
    encoder.config.architectures = ["SeamlessM4Tv2Model"]
    encoder.config.save_pretrained(folder)
    SeamlessM4TFeatureExtractor().save_pretrained(folder)
    head.save(folder)
