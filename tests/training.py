"""Builders for tests of training: a small shard set with targets, made of random features that follow random tokens.

No encoder, no LLM, no audio: seconds instead of minutes. Shape letters: T frames, L tokens, E feature width, R rows of
the table, D target width.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sm_train import config, pretrain, tune
from sm_train.data import shards
from sm_train.data.hashing import tensors_hash
from sm_train.data.target_set import EMBEDDING, TABLE, TOKENIZER, UTTERANCES, cover
from sm_train.errors import exit_hard
from sm_train.train import loop, start
from sm_train.train.step import forward_backward
from tests.builders import ROOT, child_env

E, D = 16, 24
_NAMES = "<pad> red green blue old new boat house river bird child runs sees finds two seven"
WORDS = _NAMES.split()
PAD_ID = 0
TARGET = "words"
FRAMES, LANES = 160, 4


def shard_set(folder: Path, count: int = 60, seed: int = 0, rows_seed: int | None = None) -> Path:
    """A complete shard set with the target set ``words``: every eighth utterance is ``valid``, the others ``train``.

    Lengths are uneven, 8 to 63 frames; among them are utterances with P = L, P = L + 1 and P > L + 1. Sets of one
    ``rows_seed`` have the sounds and embeddings of their words in common.
    """
    rng = np.random.default_rng(seed)
    common = rng if rows_seed is None else np.random.default_rng(rows_seed)
    sound_RE = common.normal(size=(len(WORDS), E))
    samples, rows, tokens = [], [], []
    for i in range(count):
        num_tokens = int(rng.integers(2, 10))
        num_frames = 4 * (num_tokens + i % 3 * int(rng.integers(1, 4))) + int(rng.integers(0, 4))
        tokens_L = rng.integers(1, len(WORDS), size=num_tokens).astype(np.int32)
        said_T = np.repeat(tokens_L, 4)
        feats_TE = 0.1 * rng.normal(size=(num_frames, E))
        feats_TE[: len(said_T)] += sound_RE[said_T]
        samples.append({"id": f"utt-{i:03d}", "feats": feats_TE.astype(np.float16)})
        rows.append(_row(i, num_frames, " ".join(WORDS[t] for t in tokens_L)))
        tokens.append(tokens_L)
    shards.write_part(folder, "part-0000000", {"id": "str", "feats": "ndarray:float16"}, samples, rows, [], {})
    contract = {"encoder": "none", "encoder_revision": None, "encoder_hash": "none", "layer": 0, "pool": 2}
    shards.commit(folder, ["part-0000000"], contract, "utterances.parquet")
    _target_set(folder, tokens, common)
    return folder


def _row(i: int, num_frames: int, text: str) -> dict[str, Any]:
    split = "train" if i % 8 else "valid"
    return {"id": f"utt-{i:03d}", "split": split, "lang": "en", "speaker": "s", "duration_s": num_frames / 25,
            "num_frames": num_frames, "text": text, "audio": f"{i}.flac", "start_s": 0.0}  # fmt: skip


def _target_set(folder: Path, tokens: list[np.ndarray], rng: np.random.Generator) -> None:
    root = folder / "targets" / TARGET
    rows = [{"id": f"utt-{i:03d}", "utterance": i, "num_tokens": len(ids)} for i, ids in enumerate(tokens)]
    samples = [{"id": row["id"], "tokens": ids} for row, ids in zip(rows, tokens, strict=True)]
    shards.write_part(root, "part-0000000", {"id": "str", "tokens": "ndarray:int32"}, samples, rows, [], {})
    rows_RD = torch.from_numpy(0.5 * rng.normal(size=(len(WORDS), D))).float()
    tensors = {"ids": torch.arange(len(WORDS), dtype=torch.int32), "rows": rows_RD}
    save_file(tensors, root / EMBEDDING)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece(prefix="##")
    tokenizer.save(str(root / TOKENIZER))
    used = rows_RD[torch.from_numpy(np.concatenate(tokens)).long()]
    contract = {
        "llm": "none", "llm_revision": None, "normaliser": "none", "tokenizer_hash": "0", "pad_id": PAD_ID,
        "covers": cover(folder, shards.read_table(folder, UTTERANCES)), "embedding_hash": tensors_hash(tensors),
        "mean_square": float(used.double().square().mean()),
    }  # fmt: skip
    shards.commit(root, ["part-0000000"], contract, TABLE)


def write_config(path: Path, shard_folder: Path | dict[str, float], **overrides: Any) -> Path:
    """A config file of a tiny run beside its run folder; ``overrides`` are merged into its sections."""
    values: dict[str, Any] = {
        "run": str(path.with_suffix("")),
        "shards": shard_folder if isinstance(shard_folder, dict) else str(shard_folder),
        "target": TARGET,
        "mapper": {"widths": [E, 16, 32], "layers": 1, "heads": 2, "feed_forward": 32, "dropout": 0.1},
        "batch": {"frames": FRAMES, "lanes": LANES},
        "schedule": {"lr": 3e-3, "warmup_steps": 2},
        "engine": {"device": "cpu"},
        "loop": {"steps": 10, "log_every": 5, "save_every": 3, "validate_every": 5},
    }
    for name, value in overrides.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(values))  # JSON is YAML
    return path


def load(path: Path, *words: str, stage: ModuleType = pretrain) -> Any:
    """The typed config of a stage's file."""
    schema = {pretrain: pretrain.PretrainConfig, tune: tune.TuneConfig}[stage]
    return config.load(schema, [str(path), *words], stage.__name__)


def train(path: Path, *words: str, stage: ModuleType = pretrain) -> None:
    """Run a stage as its command does, in this process."""
    engine = stage.run(load(path, *words, stage=stage))
    if engine is not None:
        engine.close()


def in_ranks(world_size: int, work: Callable[[], object], timeout_s: float = 120) -> list[int]:
    """Do ``work`` in forked ranks with torchrun's variables set; their exit codes (-9 for a killed one)."""
    importlib.import_module("torch._dynamo")  # once here: each rank's first optimizer would, a second of work
    port = str(free_port())
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(work, r, world_size, port), daemon=True) for r in range(world_size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout_s)
    late = [rank for rank in ranks if rank.is_alive()]
    for rank in late:
        rank.kill()
        rank.join()
    assert not late, f"{len(late)} of {world_size} ranks were still at work after {timeout_s} s"
    return [int(rank.exitcode or 0) for rank in ranks]


def _rank(work: Callable[[], object], rank: int, world_size: int, port: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=port)  # fmt: skip
    torch.set_num_threads(1)
    try:
        work()
    except BaseException:
        traceback.print_exc()
        exit_hard(1)
    exit_hard(0)


def wait_for(is_so: Callable[[], bool], timeout_s: float = 120) -> None:
    """Wait until something is so."""
    end = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < end, f"not so within {timeout_s} s"
        time.sleep(0.005)


def kill_at_step(step: int, run: Path | None = None, saved: int = 0) -> None:
    """Let this process kill itself in the middle of a step.

    Args:
        run, saved: first wait until the checkpoint of step ``saved``, written beside the training, is the latest.
    """
    real = loop.learning_rate

    def killing(cfg: Any, number: int, steps: int) -> float:
        if number + 1 == step:  # the backward is done, the update is not
            if run is not None:
                link = run / "checkpoints/latest"
                wait_for(lambda: link.is_symlink() and os.readlink(link) == f"step-{saved}")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(cfg, number, steps)

    loop.learning_rate = killing


def free_port() -> int:
    """A port of this machine that nobody listens on, below those that the kernel hands out: it stays free."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


def torchrun(world_size: int, *argv: object) -> list[str]:
    """The command line of ``torchrun -m argv``."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size),
            "-m", *map(str, argv)]  # fmt: skip


def run_command(command: list[str], timeout_s: float = 180) -> subprocess.CompletedProcess[str]:
    """Run a command line to its end."""
    return subprocess.run(command, cwd=ROOT, env=child_env(), capture_output=True, text=True, timeout=timeout_s)


def first_gradients(path: Path, out: Path, *words: str, stage: ModuleType = pretrain) -> None:
    """Gradients and losses of a run's first step, by the loop's own code; rank 0 writes them to ``out``."""

    def take(
        cfg: Any, schedule: Any, engine: Any, objective: Any, loader: Any, run: Any, log: Any, validate: Any
    ) -> None:
        engine.module.train()
        step = next(loader.steps(run.position))
        terms, _ = forward_backward(engine, objective, loader, step, run.seed)
        gradients = dict(engine.gradients())
        if engine.rank == 0:
            save_file({**gradients, **{n: torch.tensor(v, dtype=torch.float64) for n, v in terms.items()}}, out)

    start.train = take  # this process is a fork
    train(path, *words, stage=stage)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    """Loss by step."""
    return {line["step"]: line["loss"] for line in metrics(run)}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Weights and moments of a checkpoint folder."""
    weights = load_file(folder / "mapper.safetensors")
    return {
        **{f"weight.{name}": tensor for name, tensor in weights.items()},
        **load_file(folder / "moments.safetensors"),
    }


def assert_equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    """Same names, same values, bit for bit (0.0 equals -0.0)."""
    assert sorted(one) == sorted(other)
    unequal = [name for name in one if not torch.equal(one[name], other[name])]
    assert not unequal, f"{len(unequal)} of {len(one)} tensors differ, such as {unequal[0]}"


def relative_difference(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """|one - other| / |other| over all tensors as one vector, in float64."""
    assert sorted(one) == sorted(other)
    a, b = (torch.cat([d[name].double().flatten() for name in sorted(d)]) for d in (one, other))
    return float((a - b).norm() / b.norm())


def watch_calls(patch: pytest.MonkeyPatch, before: Callable[[str], object]) -> None:
    """Call ``before`` with the name of each file-system call that makes a checkpoint durable, just before it."""
    from sm_train.train import checkpoint

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            before(f"{name} {args[-1] if name == 'save_file' else args[0]}")
            return real(*args, **kwargs)

        return wrapper

    for name in ("rename", "replace", "symlink", "fsync"):
        patch.setattr(os, name, watched(name, getattr(os, name)))
    patch.setattr(checkpoint, "save_file", watched("save_file", checkpoint.save_file))
    patch.setattr("shutil.rmtree", watched("rmtree", __import__("shutil").rmtree))
