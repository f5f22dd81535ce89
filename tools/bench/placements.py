"""Memory and step time of stage 2 by placement of the LLM: measured here, and predicted for GPUs by one formula.

    python -m tools.bench.placements [key=value ...]

A random Llama, synthetic features and tasks and an untrained mapper are made in a temporary folder; torchrun runs the
real command with every placement in turn, and its ranks' memory is read from /proc (Linux). --help lists the keys.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import torch
from safetensors.torch import save_file

from cluster.fit.memory import Batch, Llama, Mapper, memory_terms
from sm_train import config, files
from sm_train.chat import Chat
from sm_train.data import shards
from sm_train.data.lengths import FRAMES_PER_POSITION
from sm_train.data.plan import Position
from sm_train.data.target_set import TargetSet
from sm_train.errors import UserError, run_command
from sm_train.models import targets, tasks
from sm_train.models.mapper import MapperConfig, SpeechMapper
from sm_train.models.tokenizer import read_tokenizer
from sm_train.train import attempts, checkpoint, start
from sm_train.train.engines.base import fresh_state
from tools.bench import BATCHES, PLACEMENTS, Measured, Memory, memory_of, ranks_of, started
from tools.bench.predictions import measured_table, prediction_table

TOKENIZER = Path(__file__).parents[1] / "miniature/weights/llm"
MIB = 2**20
PROMPT = "Repeat what you hear.\n{speech}"
WORDS = ["the", "red", "blue", "old", "new", "boat", "house", "river", "child"]
_IDLE = """
import sys, torch, torch.utils.tensorboard, sm_train.tune
from transformers import LlamaForCausalLM
from sm_train.train.engines import EngineConfig, make_engine
engine, tiny = make_engine(EngineConfig(device="cpu", **{}), 1), torch.nn.Linear(4, 4)
engine.prepare(tiny, tiny, None)
engine.backward(engine.forward(torch.ones(1, 4)).sum(), is_last=True)
engine.step(0.0)
print("ready", flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class BenchConfig:
    """What is measured; the defaults make an LLM of 309M parameters."""

    show: str = config.key("all", "all | measured | predicted")
    ranks: int = config.key(2, "processes of a run, one thread each")
    precision: str = config.key("fp32", "fp32 | bf16")
    layers: int = config.key(16, "the LLM's layers")
    width: int = config.key(
        1024, "its width, a multiple of 256; heads of 64, four to one of keys, feed-forward 4 x width"
    )
    vocabulary: int = config.key(32_000, "its vocabulary; embedding and head are two tensors")
    items: int = config.key(2, "utterances of a micro-batch, one micro-batch a rank and step")
    positions: int = config.key(77, "mapped positions of an utterance: 12.3 s")
    words: int = config.key(44, "words of a transcript, which is the answer")
    recomputed: bool = config.key(False, "checkpoint_activations")
    steps: int = config.key(8, "steps of a run")
    skip: int = config.key(3, "its first steps, which are not counted")
    interval_s: float = config.key(0.25, "seconds between two looks at the ranks' memory")

    def __post_init__(self) -> None:
        if self.show not in ("all", "measured", "predicted"):
            raise ValueError(f"show is {self.show!r}; it must be all, measured or predicted")
        if not 0 < self.skip < self.steps:
            raise ValueError(f"skip is {self.skip}; it must lie between 1 and steps - 1 ({self.steps - 1})")
        if self.width < 256 or self.width % 256:
            raise ValueError(f"width is {self.width}; it must be a multiple of 256")

    @property
    def llm(self) -> Llama:
        heads = self.width // 64
        return Llama(self.layers, self.width, heads, heads // 4, 4 * self.width, self.vocabulary)

    @property
    def mapper(self) -> MapperConfig:
        """Two layers a block, without dropout: with it, attention on a CPU keeps its whole matrix."""
        widths = [self.width // 4, self.width // 2, self.width]
        return MapperConfig(widths=widths, layers=2, heads=4, feed_forward=self.width, dropout=0.0)


def make_llm(llm: Llama, folder: Path) -> None:
    """A Llama of random weights with the miniature's tokenizer, as a Hugging Face folder."""
    d, kv, f = llm.width, llm.width // llm.heads * llm.kv_heads, llm.feed_forward
    attention = {"q": (d, d), "k": (kv, d), "v": (kv, d), "o": (d, d)}
    shapes = {f"self_attn.{name}_proj": shape for name, shape in attention.items()}
    shapes |= {"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
    dtype, layers = torch.bfloat16, range(llm.layers)  # as checkpoints are; in fp32 every rank has a copy of its own
    random = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=dtype)
    tensors = {f"model.layers.{i}.{name}.weight": random(*shape).mul_(0.5 * shape[1] ** -0.5)
               for i in layers for name, shape in shapes.items()}  # fmt: skip
    norms = [f"model.layers.{i}.{name}_layernorm" for i in layers for name in ("input", "post_attention")]
    tensors |= {f"{name}.weight": torch.ones(d, dtype=dtype) for name in [*norms, "model.norm"]}
    tensors["model.embed_tokens.weight"] = random(llm.vocabulary, d)
    tensors["lm_head.weight"] = random(llm.vocabulary, d).mul_(d**-0.5)
    shutil.copytree(TOKENIZER, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shape = {"hidden_size": d, "intermediate_size": f, "num_hidden_layers": llm.layers, "vocab_size": llm.vocabulary,
             "num_attention_heads": llm.heads, "num_key_value_heads": llm.kv_heads, "head_dim": d // llm.heads,
             "tie_word_embeddings": False}  # fmt: skip
    files.write_json(folder / "config.json", {**files.read_json(TOKENIZER / "config.json"), **shape})


def make_world(cfg: BenchConfig, folder: Path) -> Batch:
    """LLM, shard set, targets, tasks, an untrained mapper and ``tune.yaml``; returns the micro-batch that they make."""
    rng, frames, count = np.random.default_rng(0), FRAMES_PER_POSITION * cfg.positions, 8 * cfg.items * cfg.ranks
    make_llm(cfg.llm, folder / "llm")
    texts, shard_set = [" ".join(rng.choice(WORDS, cfg.words)) for _ in range(count)], folder / "set"
    fixed = {"split": "train", "lang": "en", "speaker": "s", "duration_s": frames / 25, "num_frames": frames}
    rows = [{"id": f"utt-{i}", "text": t, "audio": f"{i}.flac", "start_s": 0.0, **fixed} for i, t in enumerate(texts)]
    shape = (frames, cfg.mapper.widths[0])
    samples = [{"id": row["id"], "feats": rng.normal(size=shape).astype(np.float16)} for row in rows]
    shards.write_part(shard_set, "part-0000000", {"id": "str", "feats": "ndarray:float16"}, samples, rows, [], {})
    contract = {"encoder": "none", "encoder_revision": None, "encoder_hash": "none", "layer": 0, "pool": 2}
    shards.commit(shard_set, ["part-0000000"], contract, "utterances.parquet")
    targets.build(targets.TargetConfig("bench", str(folder / "llm")), shard_set)
    about = {"task": "asr", "variables": {}, "target_lang": "en"}
    lines = [json.dumps({"utterance_id": row["id"], "answer": row["text"], **about}) for row in rows]
    files.write_text(folder / "asr.jsonl", "\n".join(lines) + "\n")
    tasks.build(shard_set, "bench", [folder / "asr.jsonl"])
    opened = TargetSet(shard_set, "bench")
    torch.manual_seed(0)
    mapper = SpeechMapper(cfg.mapper, cfg.mapper.widths[0], cfg.width, opened.rms)
    frozen = start.frozen(files.read_json(shard_set / shards.DATASET), opened)
    untrained = checkpoint.Checkpoint(fresh_state(mapper), 1, Position(0, 1), frozen, None)
    attempt = attempts.begin(folder / "stage1")
    checkpoint.save(folder / "stage1", attempt, untrained, mapper.description(), is_best=True, keep=1)
    files.write_json(folder / "prompts.yaml", {"asr": {"train": [PROMPT], "held_out": []}})
    values = {
        "run": str(folder), "mapper": str(folder / "stage1"), "shards": str(shard_set), "target": "bench",
        "tasks": {"asr": 1.0}, "prompts": str(folder / "prompts.yaml"), "splits": ["train"], "valid_splits": [],
        "checkpoint_activations": cfg.recomputed, "batch": {"samples": cfg.items, "lanes": cfg.ranks},
        "engine": {"device": "cpu", "precision": cfg.precision},
        "loop": {"steps": cfg.steps, "save_every": cfg.steps, "log_every": cfg.steps},
    }  # fmt: skip
    files.write_json(folder / "tune.yaml", values)  # JSON is YAML
    chat = Chat(read_tokenizer(folder / "llm"))
    answer = max(map(len, chat.answers(texts)))
    return Batch(cfg.items, sum(map(len, chat.halves(PROMPT))) + cfg.positions + answer - 1, cfg.positions, answer)


def baseline(cfg: BenchConfig, folder: Path, placement: str) -> float:
    """Resident MiB of one of as many processes as there are ranks: all is imported, an engine trains 20 numbers."""
    zero_3 = {"name": "deepspeed", "zero_stage": 3, "offload": placement == "offload"}
    command = [sys.executable, "-c", _IDLE.format({} if placement == "replicated" else zero_3)]
    with ExitStack() as stack:
        logs = [folder / f"idle-{rank}.log" for rank in range(cfg.ranks)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        processes = [stack.enter_context(started(command, log, **pipes)) for log in logs]
        for process, log in zip(processes, logs, strict=True):
            if process.stdout is None or "ready\n" not in process.stdout:
                raise RuntimeError(f"the idle process failed: {log.read_text()[-2000:]}")
        return max(found["pss"] for process in processes if (found := memory_of(process.pid)))


def measure(cfg: BenchConfig, folder: Path, placement: str, batch: Batch) -> Measured:
    """Run stage 2 with one placement on all ranks, and look at them while it runs."""
    run, log = folder / placement, folder / f"{placement}.log"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={cfg.ranks}", "-m",
               "sm_train.tune", str(folder / "tune.yaml"), f"run={run}", f"placement={placement}"]  # fmt: skip
    looks: list[tuple[int, int, Memory]] = []
    with started(command, log, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            metrics = run / "metrics.jsonl"
            step = metrics.read_text().count("\n") if metrics.exists() else 0
            seen = ((rank, memory_of(pid)) for rank, pid in sorted(ranks_of(process.pid).items()))
            looks += [(rank, step, memory) for rank, memory in seen if memory]
            time.sleep(cfg.interval_s)
    if process.returncode:
        raise RuntimeError(f"{placement} ended with {process.returncode}: {log.read_text()[-3000:]}")
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    inside = {
        rank: [m for r, step, m in looks if r == rank and cfg.skip <= step < cfg.steps] for rank in range(cfg.ranks)
    }
    if not all(inside.values()):
        raise UserError(f"interval_s is {cfg.interval_s}: {placement} took no longer for its steps; lower it")
    shapes = cfg.llm, Mapper(cfg.mapper, cfg.width), batch
    terms = memory_terms(*shapes, placement, cfg.ranks, cfg.precision, recomputed=cfg.recomputed, on_cpu=True)
    return Measured(
        placement,
        median(line["step_s"] for line in steps[cfg.skip :]),
        resident=[median(m["pss"] for m in found) for found in inside.values()],
        most=[max(m["pss"] for m in found) for found in inside.values()],
        mapped=max(m["file"] for found in inside.values() for m in found),
        peak=[max(m["peak"] for r, _, m in looks if r == rank) for rank in inside],
        baseline=baseline(cfg, folder, placement),
        predicted=sum(terms.values()) / MIB,
        loss=steps[-1]["loss"],
    )


def show_measured(cfg: BenchConfig) -> None:
    """Print the table of this machine, and what it was made with."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    with tempfile.TemporaryDirectory(prefix="bench-placements-") as name:
        batch = make_world(cfg, Path(name))
        runs = [measure(cfg, Path(name), placement, batch) for placement in PLACEMENTS]
    losses = [run.loss for run in runs]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    weights = cfg.llm.parameters * (4 if cfg.precision == "fp32" else 2) / MIB
    print(
        f"LLM {cfg.llm.parameters / 1e6:.0f}M in {cfg.precision}, {weights:,.0f} MiB; mapper "
        f"{Mapper(cfg.mapper, cfg.width).parameters / 1e6:.1f}M; {batch}; {cfg.ranks} ranks of 1 thread, steps "
        f"{cfg.skip + 1} to {cfg.steps}; {platform.machine()} CPU, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, {versions}\n"
    )
    print(measured_table(runs))
    print(f"\nlast losses differ by {max(losses) / min(losses) - 1:.1e}\n", flush=True)


def main(argv: list[str]) -> None:
    if any(word in ("-h", "--help") for word in argv):
        print(f"usage: python -m tools.bench.placements [key=value ...]\n\nkeys:\n{config.describe(BenchConfig)}")
        return
    if wrong := [word for word in argv if "=" not in word]:
        raise UserError(f"{wrong[0]!r} is not of the form key=value; --help lists the keys")
    cfg = config.from_mapping(BenchConfig, dict(word.split("=", 1) for word in argv), "tools.bench.placements")
    if cfg.show != "predicted":
        show_measured(cfg)
    for batch in BATCHES if cfg.show != "measured" else ():
        print(
            f"Predicted, not measured on a GPU: {batch.items} x {batch.row_tokens} tokens\n\n{prediction_table(batch)}"
        )


if __name__ == "__main__":
    run_command(main)
