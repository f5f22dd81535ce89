"""How fast verified, padded micro-batches come, against raw reading and three other loaders on the same data.

    python -m tools.bench.loader [key=value ...]     # --help lists the keys

All files are in the page cache, one process reads (and its workers, where a loader has them). Passes are interleaved:
every loader goes through all data once, then every loader again. Loaders that are not installed are left out
(requirements-bench.lock has them).

Shape letters: B items, T frames, E feature width.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from sm_train import config
from sm_train.config import key
from sm_train.data import shards
from sm_train.data.batches import SpeechItems
from sm_train.data.hashing import tensors_hash
from sm_train.data.loader import Loader, plan_items
from sm_train.data.plan import Position
from sm_train.data.samples import FEATS, TOKENS
from sm_train.data.target_set import EMBEDDING, TABLE, UTTERANCES, TargetSet, cover
from sm_train.errors import UserError, run_command
from tools.bench.loader_peers import FRAMES, ITEMS, E, T, lhotse, mosaic, webdataset

GB = 10**9


@dataclass(frozen=True)
class LoaderBench:
    """Keys."""

    samples: int = key(1600, "samples of 308 x 1024 fp16, 630 KB each")
    passes: int = key(7, "passes of every loader; the medians count")
    folder: str | None = key(None, "where the data goes; null for a temporary folder that is removed")


def write_ours(root: Path, feats: Callable[[int], np.ndarray], count: int) -> None:
    """A shard set with a target set, 320 samples a part."""
    parts, target, tokens_L = [], root / "targets/t", np.arange(40, dtype=np.int32)
    for begin in range(0, count, 320):
        part, numbers = f"part-{begin // 320:07d}", range(begin, min(begin + 320, count))
        ids = [f"utt-{i:06d}" for i in numbers]
        rows = [{"id": i, "split": "train", "duration_s": T / 25, "num_frames": T, "text": i} for i in ids]
        spoken = ({"id": f"utt-{i:06d}", "feats": feats(i)} for i in numbers)
        shards.write_part(root, part, FEATS, spoken, rows, [], {})
        of_tokens = [{"id": f"utt-{i:06d}", "utterance": i, "num_tokens": len(tokens_L)} for i in numbers]
        shards.write_part(target, part, TOKENS, [{"id": i, "tokens": tokens_L} for i in ids], of_tokens, [], {})
        parts.append(part)
    shards.commit(root, parts, {}, "utterances.parquet")
    tensors = {"ids": torch.arange(40, dtype=torch.int32), "rows": torch.ones(40, 8)}
    save_file(tensors, target / EMBEDDING)
    contract = {
        "covers": cover(root, shards.read_table(root, UTTERANCES)),
        "embedding_hash": tensors_hash(tensors),
        "pad_id": 0,
    }
    shards.commit(target, parts, contract, TABLE)


def ours(root: Path, read_ahead: int) -> Callable[[], int]:
    """Plan, read, verify, pad, targets too; a pass is an epoch of one-lane steps, one after another as in training."""
    items = SpeechItems(root, TargetSet(root, "t"), ["train"])
    loader = Loader(items, lambda columns: {}, plan_items(items, 0, FRAMES, 1), 0, 1, read_ahead)
    steps, made = loader.planner.epoch(0).num_steps, loader.steps(Position(0, 0))

    def one_pass() -> int:
        taken = [batch for _ in range(steps) for _, batch in next(made).batches]
        return sum(int(batch.num_frames_B.sum()) for batch in taken)  # type: ignore[attr-defined]

    return one_pass


def raw(root: Path) -> Callable[[], int]:
    """The same files from end to end, 4 MiB at a time, into one buffer."""
    paths, buffer = sorted(root.glob("part-*/*.mds")), bytearray(1 << 22)

    def one_pass() -> int:
        total = 0
        for path in paths:
            handle, begin = os.open(path, os.O_RDONLY), 0
            while done := os.preadv(handle, [buffer], begin):
                begin += done
            total += begin
            os.close(handle)
        return total // (2 * E)

    return one_pass


def contestants(root: Path, feats: Callable[[int], np.ndarray], count: int) -> Iterator[tuple[str, Callable[[], int]]]:
    """Every loader in every setting, ready to go."""
    write_ours(root / "ours", feats, count)
    yield "raw: sequential preadv of 4 MiB", raw(root / "ours")
    for read_ahead in (0, 2):
        yield f"sm_train, verified, read_ahead {read_ahead}", ours(root / "ours", read_ahead)
    makers: dict[str, Callable[[], Callable[[int], Callable[[], int]]]] = {
        "MosaicML StreamingDataLoader": lambda: lambda workers: mosaic(root / "ours", workers),
        "WebDataset": lambda: webdataset(root / "tars", feats, count),
        "lhotse Shar": lambda: lhotse(root / "shar", feats, count),
    }
    for name, maker in makers.items():
        try:
            made = maker()
            for workers in (0, 2):
                yield f"{name}, {workers} workers", made(workers)
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)


def measure(cfg: LoaderBench, folder: Path) -> Mapping[str, list[float]]:
    """GB/s of every pass by loader; each must give every frame."""
    rng = np.random.default_rng(0)
    some = [rng.normal(size=(T, E)).astype(np.float16) for _ in range(16)]

    def feats(i: int) -> np.ndarray:
        made = some[i % len(some)].copy()
        made[0, 0] = i
        return made

    runners = dict(contestants(folder, feats, cfg.samples))
    speeds: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(cfg.passes + 1):  # the first fills the page cache and starts workers
        for name, one_pass in runners.items():
            begun = time.perf_counter()
            frames = one_pass()
            seconds = time.perf_counter() - begun
            if "raw" not in name and frames != cfg.samples * T:
                raise RuntimeError(f"{name} gave {frames} frames, not {cfg.samples * T}")
            if number:
                speeds[name].append(cfg.samples * T * E * 2 / seconds / GB)
    return speeds


def show(speeds: Mapping[str, list[float]]) -> None:
    """The table."""
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    reference = medians[next(iter(medians))]
    best = max((m for name, m in medians.items() if "raw" not in name and "sm_train" not in name), default=0.0)
    print("| loader | GB/s, median | slowest to fastest pass | of raw | of the best other |\n|---|---|---|---|---|")
    for name, median in medians.items():
        low, high = min(speeds[name]), max(speeds[name])
        of_best = f"{median / best:.2f}x" if best else ""
        print(f"| {name} | {median:.2f} | {low:.2f} to {high:.2f} | {median / reference:.2f} | {of_best} |")


def main(argv: list[str]) -> None:
    if any(word in ("-h", "--help") for word in argv):
        print(f"usage: python -m tools.bench.loader [key=value ...]\n\nkeys:\n{config.describe(LoaderBench)}")
        return
    if wrong := [word for word in argv if "=" not in word]:
        raise UserError(f"{wrong[0]!r} is not of the form key=value; --help lists the keys")
    cfg = config.from_mapping(LoaderBench, dict(word.split("=", 1) for word in argv), "tools.bench.loader")
    if cfg.samples < ITEMS or cfg.passes < 1:
        raise UserError(f"samples is {cfg.samples}, passes {cfg.passes}; take at least {ITEMS} and 1")
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:  # or glibc gives every 630 KB back, and the others crawl
        thresholds = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}
        os.execvpe(sys.executable, [sys.executable, "-m", "tools.bench.loader", *argv], {**os.environ, **thresholds})
    with tempfile.TemporaryDirectory(prefix="loader-", dir=cfg.folder) as folder:
        show(measure(cfg, Path(folder)))


if __name__ == "__main__":
    run_command(main)
