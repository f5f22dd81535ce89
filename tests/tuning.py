"""Builders for tests of stage 2: tasks and prompts about the session's shard set, a stage-1 mapper, a config; and small
sets of random features for one family's LLM.

The shard set, its target set ``tiny`` and the random Llama they are for are conftest's; nothing here is trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sm_train import files, tune
from sm_train.chat import Chat
from sm_train.data import shards
from sm_train.data.batches import SpeechItems
from sm_train.data.instructions import InstructionItems, Mixture
from sm_train.data.lengths import FRAMES_PER_POSITION
from sm_train.data.plan import Position
from sm_train.data.shards import read_table
from sm_train.data.target_set import TargetSet
from sm_train.models import targets, tasks
from sm_train.models.llm import load_model
from sm_train.models.mapper import MapperConfig, SpeechMapper
from sm_train.models.tokenizer import Tokenizer
from sm_train.prompts import PromptSet
from sm_train.train import attempts, checkpoint, start
from sm_train.train.engines.base import fresh_state
from sm_train.train.objectives.instruct import InstructConfig, InstructObjective
from sm_train.train.objectives.padded import PaddedRegression
from tests import training
from tests.families import family

TARGET = "tiny"
PROMPTS = {
    "asr": {"train": ["Repeat.\n{speech}", "{speech}\nSay it again."], "held_out": ["Write it.\n{speech}"]},
    "st": {"train": ["Into {target_language}.\n{speech}"], "held_out": []},
    "sqa": {"train": ["{speech}\n{question}?", "Answer {question}.\n{speech}\nNow."], "held_out": []},
}


def instructions(path: Path, shard_set: Path) -> Path:
    """An asr, two st and, for half of them, an sqa task about each utterance, as JSONL."""
    rows = []
    for i, utterance in enumerate(read_table(shard_set, "utterances.parquet").to_pylist()):
        text, about = utterance["text"], {"utterance_id": utterance["id"]}
        rows.append({**about, "task": "asr", "variables": {}, "target_lang": "en", "answer": text})
        for language in ("fr", "de"):
            answer = " ".join(reversed(text.split()))
            rows.append({**about, "task": "st", "variables": {}, "target_lang": language, "answer": answer})
        if i % 4 < 2:
            question = {"question": f"what is word {i % 3}"}
            rows.append({**about, "task": "sqa", "variables": question, "target_lang": "en", "answer": text.split()[0]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pretrained(folder: Path, shard_set: Path, seed: int = 4, width: int | None = None) -> Path:
    """A run folder with one checkpoint of an untrained mapper, as stage 1 leaves it."""
    targets = TargetSet(shard_set, TARGET)
    torch.manual_seed(seed)
    cfg = MapperConfig(widths=[32, 16, 24], layers=1, heads=2, feed_forward=32, dropout=0.1)
    mapper = SpeechMapper(cfg, 32, width or targets.rows_RD.shape[1], targets.rms)
    contract = start.frozen(files.read_json(shard_set / "dataset.json"), targets)
    made = checkpoint.Checkpoint(fresh_state(mapper), 1, Position(0, 1), contract, None)
    attempt = attempts.begin(folder)
    checkpoint.save(folder, attempt, made, mapper.description(), is_best=True, keep=1)
    return folder


def world(folder: Path, shard_set: Path) -> Path:
    """Tasks in the target set, prompts.yaml and a mapper's run folder; returns ``folder``."""
    tasks.build(shard_set, TARGET, [instructions(folder / "instructions.jsonl", shard_set)])
    (folder / "prompts.yaml").write_text(json.dumps(PROMPTS))
    pretrained(folder / "stage1", shard_set)
    return folder


def write_config(path: Path, world_folder: Path, shard_set: Path, **overrides: Any) -> Path:
    """A config file of a tiny run beside its run folder; ``overrides`` are merged into its sections."""
    values: dict[str, Any] = {
        "run": str(path.with_suffix("")),
        "mapper": str(world_folder / "stage1"),
        "shards": str(shard_set),
        "target": TARGET,
        "tasks": {"asr": 1.0, "sqa": 0.5},
        "prompts": str(world_folder / "prompts.yaml"),
        "splits": ["train"],
        "valid_splits": ["dev"],
        "batch": {"tokens": 300, "lanes": 2},
        "schedule": {"lr": 1e-2},
        "engine": {"device": "cpu"},
        "loop": {"steps": 8, "log_every": 4, "save_every": 3, "validate_every": 4},
    }
    for name, value in overrides.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(values))  # JSON is YAML
    return path


def train(path: Path, *words: str) -> None:
    """Run stage 2 as the command does, in this process."""
    training.train(path, *words, stage=tune)


# ---- one family's LLM, and a set of its own

TEXTS = [
    "the old boat runs by the red house", "stones", "two birds see the small river of the time",
    "le vieux bateau file", "a word of the people",
]  # fmt: skip


def mixture(weights: Mapping[str, float], **settings: Any) -> Mixture:
    """A mixture of :data:`PROMPTS`."""
    chosen = {"prompts": PromptSet(PROMPTS), "group": "train", "unit": "tokens", "max_answer_tokens": 60, "seed": 0}
    return Mixture(weights, **{**chosen, **settings})


def spoken(folder: Path, texts: Sequence[str], num_frames: Sequence[int], width: int = 8) -> Path:
    """A complete shard set of random features, one utterance of split ``train`` a text."""
    rng = np.random.default_rng(5)
    samples, rows = [], []
    for i, (text, frames) in enumerate(zip(texts, num_frames, strict=True)):
        samples.append({"id": f"utt-{i}", "feats": rng.normal(size=(frames, width)).astype(np.float16)})
        rows.append({"id": f"utt-{i}", "split": "train", "lang": "en", "speaker": "s", "duration_s": frames / 25,
                     "num_frames": frames, "text": text, "audio": f"{i}.flac", "start_s": 0.0})  # fmt: skip
    shards.write_part(folder, "part-0000000", {"id": "str", "feats": "ndarray:float16"}, samples, rows, [], {})
    contract = {"encoder": "none", "encoder_revision": None, "encoder_hash": "none", "layer": 0, "pool": 2}
    shards.commit(folder, ["part-0000000"], contract, "utterances.parquet")
    return folder


@dataclass(frozen=True)
class Small:
    """A family's LLM, and the instructions about :data:`TEXTS` for it."""

    name: str
    llm_folder: Path
    llm: Any
    chat: Chat
    items: InstructionItems
    """asr, st-fr and st-de of all, sqa of some."""

    @property
    def targets(self) -> TargetSet:
        """The target set of the LLM."""
        return self.items.speech.targets

    def objective(self, mapper: Any = None, splice: str = "all", **settings: Any) -> InstructObjective:
        """The objective of this LLM, with an untrained mapper unless one is given."""
        cfg, contract = InstructConfig(**settings), self.targets.contract
        if mapper is None:
            torch.manual_seed(6)
            shape = MapperConfig(widths=[8, 8, 8], layers=1, heads=2, feed_forward=8, dropout=0.0)
            mapper = SpeechMapper(shape, 8, self.targets.rows_RD.shape[1], self.targets.rms)
        scale = (contract["mean_square"], cfg.mse, "words")
        regression = PaddedRegression(self.targets.rows_RD, self.targets.pad_row, *scale)
        made = InstructObjective(mapper, regression, cfg, splice)
        made.llm = self.llm
        return made


def small(folder: Path, name: str, spare: Sequence[int] = (0,)) -> Small:
    """Make the world of a family; utterances have as many positions as tokens, and ``spare`` more in turn."""
    llm_folder = family(folder / "llm", name)
    tokenizer = Tokenizer(llm_folder, None)
    positions = [len(tokenizer.ids(text)) + spare[i % len(spare)] for i, text in enumerate(TEXTS)]
    frames = [FRAMES_PER_POSITION * count + i % FRAMES_PER_POSITION for i, count in enumerate(positions)]
    root = spoken(folder / "set", TEXTS, frames)
    targets.build(targets.TargetConfig(name, str(llm_folder)), root)
    tasks.build(root, name, [instructions(folder / "instructions.jsonl", root)])
    chat = Chat(tokenizer.inner)
    speech = SpeechItems(root, TargetSet(root, name), ["train"])
    items = InstructionItems(speech, chat, mixture({"asr": 1.0, "st": 1.0, "sqa": 1.0}))
    return Small(name, llm_folder, load_model(str(llm_folder), None, "float32"), chat, items)


def table_path(root: Path, name: str = TARGET) -> Path:
    """Where a target set's tasks are."""
    return root / "targets" / name / "tasks.parquet"


def asr(id: str, answer: str = "the red boat") -> dict[str, Any]:
    """A row of instructions."""
    return {"utterance_id": id, "task": "asr", "variables": {}, "target_lang": "en", "answer": answer}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    """Rows as an instructions file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
