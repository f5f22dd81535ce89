"""What there is to hear: lengths of utterances, texts, bytes; from a manifest, or from figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from sm_train.chat import Chat
from sm_train.data import manifest
from sm_train.data.text import normalise
from sm_train.errors import UserError
from sm_train.models.tokenizer import Tokenizer
from sm_train.prompts import read_prompts
from sm_train.records import Utterance
from tools.plan_capacity.settings import CorpusConfig, PlanConfig
from tools.plan_capacity.shapes import Shapes

_SAMPLE = 100_000
"""Utterances that a plan is made with, at most."""
_READ = 20_000
"""Texts that are tokenised."""
_TOKENIZER_BYTES = 10e6
"""tokenizer.json of an LLM with 128k tokens, about."""
_STATED = 2_000
"""Audio files whose size is asked for."""


@dataclass(frozen=True)
class Corpus:
    """A corpus of some size. Means are by utterance."""

    durations_s: NDArray[np.float64]
    """Of training utterances: all, or a sample."""
    num_train: float
    num_valid: float
    num_test: float
    valid_s: float
    test_s: float
    tokens: float
    """Of a transcript."""
    prompt_tokens: float
    """Of the longest wording around the speech."""
    used_rows: float
    """Rows of the LLM's embedding that the corpus uses, the pad's included; at most, where nobody has counted."""
    audio_mb_per_hour: float
    tasks: float
    id_bytes: float
    audio_bytes: float
    text_bytes: float
    answer_bytes: float
    tokenizer_bytes: float
    source: str

    @property
    def mean_s(self) -> float:
        return float(self.durations_s.mean())

    @property
    def train_s(self) -> float:
        """Seconds of audio to train on."""
        return self.num_train * self.mean_s

    @property
    def all_s(self) -> float:
        """Seconds of audio to encode."""
        return self.train_s + self.valid_s + self.test_s

    @property
    def num_all(self) -> float:
        return self.num_train + self.num_valid + self.num_test

    def frames(self, frame_hz: float) -> NDArray[np.int64]:
        """Stored frames of the sample. The encoder's first window leaves one out in about half of the utterances."""
        return np.maximum(np.ceil(self.durations_s * frame_hz - 0.5), 4).astype(np.int64)

    def scaled(self, hours: float) -> Corpus:
        """The same with so many hours to train on; what is held out stays."""
        return replace(self, num_train=hours * 3600 / self.mean_s) if hours else self


def read(cfg: PlanConfig, shapes: Shapes) -> Corpus:
    """The corpus that a plan names, of its own size.

    Raises:
        UserError: the manifest is missing, or a mixture is not understood.
    """
    return _of_manifest(cfg.corpus, shapes) if cfg.corpus.manifest else _of_figures(cfg.corpus, shapes)


def _of_figures(cfg: CorpusConfig, shapes: Shapes) -> Corpus:
    durations_s = _sample(cfg)
    mean_s = float(durations_s.mean())
    return Corpus(
        durations_s, 0.0, cfg.valid_hours * 3600 / mean_s, cfg.test_hours * 3600 / mean_s, cfg.valid_hours * 3600,
        cfg.test_hours * 3600, cfg.words_per_hour * cfg.tokens_per_word * mean_s / 3600, cfg.prompt_tokens,
        shapes.llm.vocabulary, cfg.audio_mb_per_hour, cfg.tasks_per_utterance, cfg.id_bytes, cfg.audio_bytes,
        cfg.text_bytes, cfg.text_bytes, _TOKENIZER_BYTES, "figures in the plan's file",
    )  # fmt: skip


def _sample(cfg: CorpusConfig) -> NDArray[np.float64]:
    if not cfg.lengths:
        return np.full(_SAMPLE, cfg.mean_s)
    rng, pieces = np.random.default_rng(0), []
    for entry in cfg.lengths:
        if not _is_piece(entry):
            raise UserError(
                f"corpus.lengths holds {entry!r}; [share, normal, mean, deviation] or [share, uniform, least, most] is "
                "wanted, the share above zero"
            )
    whole = sum(entry[0] for entry in cfg.lengths)
    for share, kind, first, second in cfg.lengths:
        pieces.append(getattr(rng, kind)(first, second, round(share / whole * _SAMPLE)))
    durations_s = np.concatenate(pieces).clip(0.5)
    return rng.permutation(durations_s * (cfg.mean_s / durations_s.mean()))


def _is_piece(entry: object) -> bool:
    if not isinstance(entry, list) or len(entry) != 4:
        return False
    share, kind, first, second = entry
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in (share, first, second)):
        return False
    return share > 0 and ((kind == "normal" and second >= 0) or (kind == "uniform" and first <= second))


def _of_manifest(cfg: CorpusConfig, shapes: Shapes) -> Corpus:
    assert cfg.manifest is not None
    utterances = manifest.read_manifest(cfg.manifest)
    splits = {"train": shapes.pretrain.splits, "valid": shapes.pretrain.valid_splits, "test": shapes.evaluate.splits}
    by_split = {name: [u for u in utterances if u.split in chosen] for name, chosen in splits.items()}
    if not by_split["train"]:
        raise UserError(f"manifest {cfg.manifest} has no utterance in the splits {', '.join(splits['train'])}")
    texts = _tokens(cfg, shapes, utterances)
    tasks = manifest.read_instructions(cfg.instructions) if cfg.instructions else []
    text_bytes = fmean(len(u.text.encode()) for u in utterances)
    durations_s = np.array([u.duration_s for u in by_split["train"]])
    return Corpus(
        durations_s[:: -(-len(durations_s) // _SAMPLE)], len(by_split["train"]), len(by_split["valid"]),
        len(by_split["test"]), _seconds(by_split["valid"]), _seconds(by_split["test"]), texts.tokens, texts.prompt,
        texts.used_rows, _audio_mb_per_hour(cfg, utterances),
        len(tasks) / len(utterances) if tasks else cfg.tasks_per_utterance,
        fmean(len(u.id.encode()) for u in utterances), fmean(len(u.audio.encode()) for u in utterances), text_bytes,
        fmean(len(task.answer.encode()) for task in tasks) if tasks else text_bytes, texts.tokenizer_bytes,
        f"manifest {cfg.manifest}",
    )  # fmt: skip


def _seconds(utterances: Sequence[Utterance]) -> float:
    return sum(u.duration_s for u in utterances)


def _audio_mb_per_hour(cfg: CorpusConfig, utterances: Sequence[Utterance]) -> float:
    """Of files that hold one utterance each; by the plan's figure where they are elsewhere."""
    root, some = Path(cfg.manifest or "").parent, utterances[:: -(-len(utterances) // _STATED)]
    here = [u for u in some if u.start_s == 0 and (root / u.audio).is_file()]
    if not here:
        return cfg.audio_mb_per_hour
    return sum((root / u.audio).stat().st_size for u in here) / 1e6 / (_seconds(here) / 3600)


@dataclass(frozen=True)
class _Texts:
    tokens: float
    used_rows: float
    prompt: float
    tokenizer_bytes: float


def _tokens(cfg: CorpusConfig, shapes: Shapes, utterances: Sequence[Utterance]) -> _Texts:
    """Texts and prompts by the LLM's own tokenizer, or by the plan's figures where the LLM is not here."""
    some = utterances[:: -(-len(utterances) // _READ)]
    if shapes.llm_folder is None:
        words = fmean(len(u.text.split()) for u in some)
        return _Texts(words * cfg.tokens_per_word, shapes.llm.vocabulary, cfg.prompt_tokens, _TOKENIZER_BYTES)
    target = next((t for t in shapes.precompute.targets if t.name == shapes.pretrain.target), None)
    tokenizer = Tokenizer(shapes.llm_folder, target.pad_token if target else None)
    ids = [tokenizer.ids(normalise(u.text, target.normaliser if target else "mms")) for u in some]
    used = {tokenizer.pad_id}.union(*ids)
    chat, prompts = Chat(tokenizer.inner), read_prompts(Path(shapes.tune.prompts))
    kinds = {name.partition("-")[0] for name in shapes.tune.shares}
    wordings = [message for kind in kinds for message in prompts.of(kind, "train") if "{" not in _unfilled(message)]
    prompt = max((sum(map(len, chat.halves(message))) for message in wordings), default=cfg.prompt_tokens)
    size = len(tokenizer.inner.backend_tokenizer.to_str().encode())
    return _Texts(fmean(map(len, ids)), len(used), prompt, size)


def _unfilled(message: str) -> str:
    """A wording less its speech: what is still in braces is a variable, whose length is not known here."""
    return message.replace("{speech}", "")
