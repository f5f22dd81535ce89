"""What checkpoints cost: how long a save stops the training, and how long a resumed run takes to its first step.

    python -m tools.bench.resume [key=value ...]

Synthetic features and targets are made in a temporary folder by the package's own writers; every figure comes from the
real command's code in processes of its own. --help lists the keys.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from sm_train import config, files
from sm_train.data import shards
from sm_train.data.hashing import tensors_hash
from sm_train.data.mds import file_digest
from sm_train.data.target_set import EMBEDDING, TABLE, UTTERANCES, cover
from sm_train.errors import UserError, run_command
from tools.bench import ROOT

SAMPLES, ROWS, TARGET = 64, 512, "bench"
MINIATURE, PAPER = ROOT / "configs/pretrain/miniature.yaml", ROOT / "configs/pretrain/llama31-8b.yaml"
_RESUMED = """
import json, sys, time
begun = time.perf_counter()
from sm_train import config, pretrain
from sm_train.data.mixing import Sources
from sm_train.train import loop, start
from sm_train.train.engines.local import LocalEngine
spent = {"imports": time.perf_counter() - begun}

def timed(owner, name, part):
    real = getattr(owner, name)
    def wrapper(*args, **kwargs):
        entered = time.perf_counter()
        try:
            return real(*args, **kwargs)
        finally:
            spent[part] = spent.get(part, 0.0) + time.perf_counter() - entered
    setattr(owner, name, wrapper)

for owner, name, part in (
    (config, "load", "config"), (start, "read", "checkpoint"), (pretrain, "Sources", "data set"),
    (Sources, "training", "data set"), (pretrain, "SpeechMapper", "mapper built"), (pretrain, "plan_items", "plan"),
    (pretrain, "Loader", "plan"), (start, "make_agreed_engine", "engine"), (LocalEngine, "prepare", "engine"),
    (start, "begin", "run begun"), (start, "RunLog", "log opened"),
):
    timed(owner, name, part)
real_step, real_train = loop._take_step, start.train

def train(*args, **kwargs):
    global entered
    entered = time.perf_counter()
    real_train(*args, **kwargs)

def take_step(*args, **kwargs):
    real_step(*args, **kwargs)
    now = time.perf_counter()
    spent["first step"], spent["main() to first step"] = now - entered, now - main_begun
    print("spent", json.dumps(spent), flush=True)
    pretrain.exit_hard()

start.train, loop._take_step = train, take_step
main_begun = time.perf_counter()
pretrain.main(sys.argv[1:])
"""
PARTS = ("config", "checkpoint", "data set", "mapper built", "plan", "engine", "run begun", "log opened", "first step")


@dataclass(frozen=True)
class BenchConfig:
    """What is measured."""

    show: str = config.key("all", "all | stall | latency")
    repeats: int = config.key(5, "processes of each row of the latency's table; medians are shown")
    utterances: list[int] = config.key([6_000, 281_241], "rows of the tables that latency is measured with")
    saves: int = config.key(5, "saves whose stall is measured; the median is shown")
    paper: bool = config.key(True, "measure the 277M mapper's stall too: 12 GiB of memory, 10 GB of disk")

    def __post_init__(self) -> None:
        if self.show not in ("all", "stall", "latency"):
            raise ValueError(f"show is {self.show!r}; it must be all, stall or latency")
        if self.repeats < 1 or self.saves < 1:
            raise ValueError(f"repeats is {self.repeats} and saves {self.saves}; both must be at least 1")


def make_set(folder: Path, count: int, encoder_width: int, llm_width: int) -> Path:
    """A shard set with targets whose tables have ``count`` rows; few samples stand on disk, many rows name each."""
    rng = np.random.default_rng(0)
    frames = rng.integers(40, 120, size=SAMPLES)
    rows = [
        {"id": f"utt-{i}", "split": "train", "lang": "en", "speaker": "s", "duration_s": int(n) / 25,
         "num_frames": int(n), "text": "a b c", "audio": f"{i}.flac", "start_s": 0.0}
        for i, n in enumerate(frames)
    ]  # fmt: skip
    feats = (rng.normal(size=(n, encoder_width)).astype(np.float16) for n in frames)
    samples = ({"id": row["id"], "feats": feats_TE} for row, feats_TE in zip(rows, feats, strict=True))
    shards.write_part(folder, "part-0000000", {"id": "str", "feats": "ndarray:float16"}, samples, rows, [], {})
    contract = {"encoder": "none", "encoder_revision": None, "encoder_hash": "none", "layer": 0, "pool": 2}
    shards.commit(folder, ["part-0000000"], contract, UTTERANCES)
    _repeat(folder, UTTERANCES, "ordinal", count)
    root = folder / "targets" / TARGET
    ids = [rng.integers(1, ROWS, size=n // 5).astype(np.int32) for n in frames]
    rows = [{"id": f"utt-{i}", "utterance": i, "num_tokens": len(tokens)} for i, tokens in enumerate(ids)]
    samples = ({"id": row["id"], "tokens": tokens} for row, tokens in zip(rows, ids, strict=True))
    shards.write_part(root, "part-0000000", {"id": "str", "tokens": "ndarray:int32"}, samples, rows, [], {})
    rows_RD = torch.randn(ROWS, llm_width, generator=torch.Generator().manual_seed(0))
    tensors = {"ids": torch.arange(ROWS, dtype=torch.int32), "rows": rows_RD}
    save_file(tensors, root / EMBEDDING)
    covers = cover(folder, shards.read_table(folder, UTTERANCES))
    of_llm = {"llm": "none", "llm_revision": None, "normaliser": "none", "tokenizer_hash": "0", "pad_id": 0,
              "covers": covers, "embedding_hash": tensors_hash(tensors), "mean_square": 1.0}  # fmt: skip
    shards.commit(root, ["part-0000000"], of_llm, TABLE)
    _repeat(root, TABLE, "utterance", count)
    return folder


def _repeat(root: Path, name: str, numbered: str, count: int) -> None:
    table = shards.read_table(root, name).take(np.arange(count) % SAMPLES)
    for column, values in (("id", [f"utt-{i:07d}" for i in range(count)]), (numbered, range(count))):
        table = table.set_column(table.column_names.index(column), column, [list(values)])
    shards.write_table(root / name, table)
    dataset = files.read_json(root / shards.DATASET)
    dataset["table_hashes"][name] = file_digest(root / name)
    files.write_json(root / shards.DATASET, dataset)


def write_config(path: Path, shipped: Path, shard_set: Path, **loop: int) -> Path:
    """A shipped config's mapper, objective and schedule on the synthetic set: one rank of plain torch, fp32."""
    values: dict[str, Any] = config.read_yaml(shipped)
    values |= {"run": str(path.with_suffix("")), "shards": str(shard_set), "target": TARGET, "valid_splits": [],
               "engine": {"device": "cpu"}, "loop": loop}  # fmt: skip
    if shipped == PAPER:
        values["batch"] = {"frames": 240, "lanes": 1}  # seconds a step instead of minutes
    files.write_json(path, values)  # JSON is YAML
    return path


def _run(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[:4]} ended with {done.returncode}: {done.stderr[-3000:]}")
    return done.stdout


def stall(cfg: BenchConfig, folder: Path, name: str, shipped: Path) -> str:
    """A row of the stall's table."""
    widths = {MINIATURE: (144, 128), PAPER: (1024, 4096)}[shipped]
    shard_set = make_set(folder / f"{name}-set", 6_000, *widths)
    every = 2
    path = write_config(folder / f"{name}.yaml", shipped, shard_set, steps=every * cfg.saves + 1, save_every=every,
                        validate_every=0, keep=1, log_every=1000)  # fmt: skip
    _run([sys.executable, "-m", "sm_train.pretrain", str(path)])
    lines = [json.loads(line) for line in (path.with_suffix("") / "metrics.jsonl").read_text().splitlines()]
    stalls = [line["checkpoint_s"] for line in lines if "checkpoint_s" in line]
    stall_s, step_s = median(stalls), median(line["step_s"] for line in lines[1:])
    save_every = config.read_yaml(shipped)["loop"]["save_every"]
    checkpoint = path.with_suffix("") / "checkpoints/latest"
    size_mb = sum(file.stat().st_size for file in checkpoint.iterdir()) / 1e6
    share = stall_s / (stall_s + save_every * step_s)
    spread = f"{stall_s:.2f} ({min(stalls):.2f} to {max(stalls):.2f})"
    return (f"| {name} | {size_mb:,.0f} MB | {spread} s | {step_s:.3f} s | {99 * stall_s:.0f} s "
            f"= {99 * stall_s / step_s:.0f} of these steps | {save_every:,} | {share:.2%} |")  # fmt: skip


def latency(cfg: BenchConfig, folder: Path, count: int) -> list[Mapping[str, float]]:
    """Seconds by part of some resumed processes, each from the same checkpoint of step 1."""
    path = write_config(folder / f"{count}.yaml", MINIATURE, make_set(folder / f"{count}-set", count, 144, 128),
                        steps=1, save_every=1, validate_every=0)  # fmt: skip
    _run([sys.executable, "-m", "sm_train.pretrain", str(path)])
    found = []
    for _ in range(cfg.repeats):
        out = _run([sys.executable, "-c", _RESUMED, str(path), "loop.steps=9", "loop.save_every=9"])
        (spent,) = (line for line in out.splitlines() if line.startswith("spent "))
        found.append(json.loads(spent.removeprefix("spent ")))
    return found


def main(argv: list[str]) -> None:
    if any(word in ("-h", "--help") for word in argv):
        print(f"usage: python -m tools.bench.resume [key=value ...]\n\nkeys:\n{config.describe(BenchConfig)}")
        return
    if wrong := [word for word in argv if "=" not in word]:
        raise UserError(f"{wrong[0]!r} is not of the form key=value; --help lists the keys")
    words = {
        name: json.loads(value) if value.startswith("[") else value for name, value in (w.split("=", 1) for w in argv)
    }
    cfg = config.from_mapping(BenchConfig, words, "tools.bench.resume")
    with tempfile.TemporaryDirectory(prefix="bench-resume-") as name:
        if cfg.show != "latency":
            heads = ("mapper", "checkpoint", "stall of a save: median (least to most)", "step",
                     "1% at a save every", "save_every shipped", "share at it")  # fmt: skip
            print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
            for mapper, shipped in (("miniature", MINIATURE), *([("paper", PAPER)] if cfg.paper else [])):
                print(stall(cfg, Path(name), mapper, shipped), flush=True)
        if cfg.show != "stall":
            shown = ("imports", "main() to first step", *PARTS, "rest")
            print(f"\n| utterances | {' | '.join(shown)} |\n|{'---|' * (len(shown) + 1)}")
            for count in cfg.utterances:
                found = latency(cfg, Path(name), count)
                rest = {"rest": [f["main() to first step"] - sum(f[p] for p in PARTS) for f in found]}
                seconds = {part: [f[part] for f in found] for part in shown[:-1]} | rest
                cells = " | ".join(f"{median(seconds[part]):.2f}" for part in shown)
                print(f"| {count:,} | {cells} |", flush=True)


if __name__ == "__main__":
    run_command(main)
