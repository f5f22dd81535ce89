"""The miniature's self-supervised speech encoder: BEST-RQ (arXiv 2202.01855), trained on speech without any text.

A random projection and a random codebook, both fixed, turn each frame of the input features into an index; spans of
frames are replaced by noise and the conformer predicts their indices. Several codebooks at once, as in arXiv
2303.01037. Architecture, features and files are those of the CTC encoder, so that everything behind it is the same.
Shape letters: B items, T encoder frames, F feature width, E encoder width, Q codebooks, C code width, V codes a book.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy, normalize
from transformers.models.seamless_m4t_v2.modeling_seamless_m4t_v2 import SeamlessM4Tv2SpeechEncoder

from sm_train.config import key
from tools.miniature.build_encoder import load_encoder, new_encoder, save_encoder
from tools.miniature.ctc import CtcBatch, CtcHead, pool_pairs, word_error_rate
from tools.miniature.speech import HELD_OUT_VOICES, TRAIN_VOICES
from tools.miniature.training import Row, bucketed, fit, score_row
from tools.miniature.utterances import Speech, SpeechConfig, plain_batches_of, speech_of
from tools.miniature.world import World

NOISE = 0.1
"""Standard deviation of what masked frames are replaced by."""


@dataclass(frozen=True)
class SslConfig(SpeechConfig):
    """How the self-supervised encoder is made; the same utterances as the CTC encoder's where the keys agree."""

    codebooks: int = key(4, "random codebooks, each with its own projection and prediction")
    codes: int = key(1024, "vectors of a codebook")
    code_width: int = key(16, "width of a codebook's vectors")
    mask_start: float = key(0.02, "chance that a masked span begins at a frame")
    mask_frames: int = key(20, "frames of a masked span, at 50 Hz")
    steps: int = key(1000, "training steps")
    learning_rate: float = key(2e-3, "peak of the one-cycle schedule")
    probe_steps: int = key(250, "steps of the linear probes, one a layer, of characters by CTC; they are not kept")


class Quantiser(torch.nn.Module):
    """Random-projection quantisers of input features; nothing of them is trained."""

    def __init__(self, features: int, config: SslConfig) -> None:
        super().__init__()
        projection_QFC = torch.empty(config.codebooks, features, config.code_width)
        for projection_FC in projection_QFC:
            torch.nn.init.xavier_uniform_(projection_FC)
        books_QVC = normalize(torch.randn(config.codebooks, config.codes, config.code_width), dim=-1)
        self.register_buffer("projection_QFC", projection_QFC)
        self.register_buffer("books_QVC", books_QVC)

    @torch.no_grad()
    def forward(self, feats_BTF: torch.Tensor) -> torch.Tensor:
        """The nearest code of each frame and book [B, T, Q], both normalised: argmax of their product."""
        codes_BTQC = normalize(torch.einsum("btf,qfc->btqc", feats_BTF, self.projection_QFC), dim=-1)
        return torch.einsum("btqc,qvc->btqv", codes_BTQC, self.books_QVC).argmax(-1)


class Predictor(torch.nn.Module):
    """A conformer with one linear prediction of codes for each book."""

    def __init__(self, encoder: SeamlessM4Tv2SpeechEncoder, config: SslConfig) -> None:
        super().__init__()
        self.feature_projection, self.encoder = encoder.feature_projection, encoder.encoder
        self.head = torch.nn.Linear(config.width, config.codebooks * config.codes)
        self.config = config

    def loss(self, batch: CtcBatch, quantiser: Quantiser, rng: np.random.Generator) -> torch.Tensor:
        """Cross-entropy of the codes of masked frames, in nats, averaged over frames and books."""
        targets_BTQ = quantiser(batch.feats_BTE)
        masked_BT = _spans(batch.mask_BT, self.config, rng)
        noise_BTF = NOISE * torch.randn_like(batch.feats_BTE)
        feats_BTF = torch.where(masked_BT[..., None], noise_BTF, batch.feats_BTE)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.bfloat16):
            hidden_BTE = self.encoder(self.feature_projection(feats_BTF), attention_mask=batch.mask_BT)
            scores = self.head(hidden_BTE[masked_BT])
        return cross_entropy(scores.float().view(-1, self.config.codes), targets_BTQ[masked_BT].flatten())


def build_ssl(config: SslConfig, world: World, folder: Path, cache: Path, seed: int) -> list[Row]:
    """Synthesise, train, write to ``folder`` in fp16, and probe what was written."""
    train = speech_of(config, world, "train", TRAIN_VOICES, config.utterances, seed, cache)
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 2])
    encoder = new_encoder(config)
    quantiser = Quantiser(train.feats[0].shape[1], config)
    predictor = Predictor(encoder, config)
    used = quantiser(train.batch(np.arange(24)).feats_BTE).flatten().unique().numel() / config.codes
    print(
        f"ssl: {sum(p.numel() for p in predictor.parameters()):,} trained parameters, {used:.0%} of codes", flush=True
    )
    minutes = fit(
        "ssl",
        predictor,
        plain_batches_of(config, train, rng),
        lambda batch: predictor.loss(batch, quantiser, rng),
        config.steps,
        config.learning_rate,
        config.warm_up,
        lambda step: f"{config.codebooks} codebooks",
        config.check_every,
    )
    save_encoder(encoder, folder)
    shipped = load_encoder(folder)
    return [
        score_row("ssl", "parameters, adaptor included", "count", shipped.num_parameters(), 1),
        score_row("ssl", f"training, {config.steps} steps", "minutes", minutes, config.steps),
        *probe(config, world, shipped, train, cache, seed),
    ]


def _spans(mask_BT: torch.Tensor, config: SslConfig, rng: np.random.Generator) -> torch.Tensor:
    """True where a frame is masked [B, T]; every utterance has one span at least, padding has none."""
    starts = rng.random(mask_BT.shape) < config.mask_start
    starts[np.arange(len(starts)), rng.integers(mask_BT.sum(1).numpy())] = True
    masked = np.zeros_like(starts)
    for shift in range(config.mask_frames):
        masked[:, shift:] |= starts[:, : starts.shape[1] - shift]
    return torch.from_numpy(masked) & mask_BT.bool()


def probe(
    config: SslConfig, world: World, encoder: SeamlessM4Tv2SpeechEncoder, train: Speech, cache: Path, seed: int
) -> list[Row]:
    """Character error rates of linear CTC heads on frozen features: input, each layer, and the output that is used."""
    heads = torch.nn.ModuleList(
        [CtcHead(train.feats[0].shape[1]), *(CtcHead(config.width) for _ in range(config.layers + 1))]
    )
    names = ["input features", *(f"layer {number}" for number in range(1, config.layers + 1)), "output"]

    def losses(batch: CtcBatch) -> torch.Tensor:
        parts = zip(heads, _every_layer(encoder, batch), strict=True)
        return sum(
            (head.loss(head(x_BPE), lengths_B, batch.texts) for head, (x_BPE, lengths_B) in parts), torch.zeros(())
        )

    rng = np.random.default_rng([seed, 3])
    fit("ssl probe", heads, plain_batches_of(config, train, rng), losses, config.probe_steps, 1e-2, 0.1, str, 10**9)
    rows = []
    for voices, speakers in (("known", TRAIN_VOICES), ("held-out", HELD_OUT_VOICES)):
        speech = speech_of(config, world, "test", speakers, config.test_utterances, seed, cache)
        for name, (rate, low, high) in zip(names, _error_rates(encoder, heads, speech), strict=True):
            print(f"ssl, probe of {name}, {voices} voices: character error rate {rate:.3f}", flush=True)
            task = f"asr, {voices} voices"
            rows.append(score_row(f"ssl, linear probe of {name}", task, "cer", rate, config.test_utterances, low, high))
    return rows


@torch.no_grad()
def _every_layer(encoder: SeamlessM4Tv2SpeechEncoder, batch: CtcBatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Input features, every layer's output and the final one [B, P, *] at 25 Hz, each with its lengths."""
    found = [batch.feats_BTE]
    hooks = [layer.register_forward_hook(lambda _, __, out: found.append(out)) for layer in encoder.encoder.layers]
    found.append(encoder.encoder(encoder.feature_projection(batch.feats_BTE), attention_mask=batch.mask_BT))
    for hook in hooks:
        hook.remove()
    return [pool_pairs(x_BTE, batch.mask_BT) for x_BTE in found]


@torch.no_grad()
def _error_rates(
    encoder: SeamlessM4Tv2SpeechEncoder, heads: torch.nn.ModuleList, speech: Speech
) -> list[tuple[float, float, float]]:
    """The rate of each head with its interval; a character is what a word is to :func:`word_error_rate`."""
    references: list[str] = []
    heard: list[list[str]] = [[] for _ in heads]
    lengths = np.array([len(feats) for feats in speech.feats])
    for rows in bucketed(lengths, 25, np.random.default_rng(0)):
        batch = speech.batch(rows)
        references += [_spelt(text) for text in batch.texts]
        for texts, head, (x_BPE, lengths_B) in zip(heard, heads, _every_layer(encoder, batch), strict=True):
            texts += [_spelt(text) for text in head.texts(head(x_BPE), lengths_B)]
    return [word_error_rate(references, texts) for texts in heard]


def _spelt(text: str) -> str:
    return " ".join(text.replace(" ", "_"))
