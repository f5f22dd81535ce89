"""How busy precompute keeps its encoder, how fast it writes, and how long it takes beside two other ways.

    python -m tools.bench.precompute [key=value ...]     # --help lists the keys

Four parts. **Inputs**: the encoder's filter bank against transformers'. **Busy**: an encoder that only sleeps, for as
long as an encoder of a known speed would take, fed from FLAC files through the real pipeline. **Writer**: parts of
630 KB samples against writing and syncing the same bytes, and against MosaicML's writer. **Beside others**: the
miniature's corpus through its encoder by cluster.precompute, by Ray Data's map_batches, by a plain loop; each started
anew as a process, start-up counted and shown apart.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from sm_train import config, files
from sm_train.config import key
from sm_train.data import manifest, shards
from sm_train.data.samples import FEATS
from sm_train.encoding.decode import DecodeConfig
from sm_train.encoding.decoders import DecodePool
from sm_train.encoding.units import UnitEncoder
from sm_train.errors import UserError, run_command
from sm_train.models.speech import EncoderConfig, SpeechEncoder
from sm_train.records import Unit, Utterance
from tools.bench import ROOT, precompute_peers

MB = 10**6
ENCODER = ROOT / "tools/miniature/weights/encoder"


@dataclass(frozen=True)
class PrecomputeBench:
    """Keys."""

    manifest: str = key("runs/demo/corpus/manifest.parquet", "the miniature's corpus; make demo makes it")
    parts: str = key("inputs,busy,writer,others", "which parts to run")
    utterances: int = key(4096, "utterances of the manifest that are used")
    speed: int = key(0, "busy: times real time of the encoder that sleeps; 0 for 100, 200 and 400, one after the other")
    passes: int = key(3, "writer and others: passes of each, interleaved; the medians count")
    actors: int = key(2, "others: actors of ours and of Ray Data, and threads of the plain loop")


class Sleeper:
    """An encoder of a known speed that computes nothing; the sleep leaves the core to others, as a GPU does."""

    width, equal_length, frame_rate_hz, shortest_samples, longest_samples = 1024, False, 25.0, 400, None
    facts: ClassVar[dict[str, int]] = {"width": 1024}
    inputs = SimpleNamespace(prepare=lambda samples_S: samples_S)

    def __init__(self, speed: float) -> None:
        self.speed = speed

    def encode(self, inputs: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """Zeros, after as long as the audio takes."""
        time.sleep(sum(map(len, inputs)) / 16_000 / self.speed)
        return [np.zeros((len(samples_S) // 640, self.width), np.float32) for samples_S in inputs]


def busy(utterances: Sequence[Utterance], root: Path, speed: int, folder: Path) -> tuple[float, float]:
    """The share of the time in which the encoder is at work, from the first unit on, and times real time."""
    settings = DecodeConfig(str(root), 60.0, -80.0, 400, None, None)
    pool = DecodePool(settings, 1, 60.0)
    encoder = UnitEncoder(Sleeper(speed), pool, folder, 60.0, 60.0, 1 << 30)  # type: ignore[arg-type]
    units = manifest.cut_units(utterances, 256)
    encoder.encode_unit(Unit(len(units), units[0].utterances))  # decoders and the writer's library are started
    begun = time.perf_counter()
    receipts = [future.result() for future in [encoder.submit(unit) for unit in units]]
    wall_s = time.perf_counter() - begun
    encoder.close()
    return sum(r.encode_s for r in receipts) / wall_s, sum(r.audio_s for r in receipts) / wall_s


def write_ours(folder: Path, feats: Sequence[NDArray[np.float16]]) -> None:
    """One part, with every hash, read back and synced."""
    samples = ({"id": f"utt-{i:06d}", "feats": feats_TE} for i, feats_TE in enumerate(feats))
    rows = [{"id": f"utt-{i:06d}"} for i in range(len(feats))]
    shards.write_part(folder, "part-0000000", FEATS, samples, rows, [], {})


def write_raw(folder: Path, feats: Sequence[NDArray[np.float16]]) -> None:
    """The same bytes into one file, synced."""
    folder.mkdir()
    with (folder / "raw").open("wb", buffering=0) as file:
        for feats_TE in feats:
            file.write(feats_TE.data)
        os.fsync(file.fileno())


def write_mosaic(folder: Path, feats: Sequence[NDArray[np.float16]]) -> None:
    """The same samples by MosaicML's own writer, without a hash, synced."""
    with precompute_peers.mosaic_writer(folder) as writer:
        for i, feats_TE in enumerate(feats):
            writer.write({"id": f"utt-{i:06d}", "feats": feats_TE})
    for path in folder.iterdir():
        files.sync(path)


def inputs(passes: int) -> tuple[float, float]:
    """Times real time of transformers' feature extractor and of ours, on one thread; the same numbers from both."""
    extractor = SpeechEncoder(EncoderConfig(path=str(ENCODER), layer=0, device="cpu"))
    theirs = precompute_peers.extractor(str(ENCODER))
    audio = [np.random.default_rng(i).normal(scale=0.1, size=16_000 * 12).astype(np.float32) for i in range(8)]
    seconds: list[tuple[float, float]] = []
    for _ in range(passes):
        begun = time.perf_counter()
        expected = [theirs(samples_S) for samples_S in audio]
        middle = time.perf_counter()
        found = [extractor.inputs.prepare(samples_S) for samples_S in audio]
        seconds.append((middle - begun, time.perf_counter() - middle))
        assert all(map(np.array_equal, expected, found))
    total_s = sum(map(len, audio)) / 16_000
    return tuple(total_s / statistics.median(column) for column in zip(*seconds, strict=True))  # type: ignore[return-value]


def timed(work: Callable[[Path, Sequence[NDArray[np.float16]]], None], feats: Sequence[NDArray[np.float16]]) -> float:
    """MB/s into a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        os.sync()
        begun = time.perf_counter()
        work(Path(folder) / "set", feats)
        return sum(f.nbytes for f in feats) / MB / (time.perf_counter() - begun)


def ours(cfg: PrecomputeBench, manifest_file: Path, out: Path) -> None:
    """cluster.precompute as a person starts it."""
    settings = {"manifest": manifest_file, "out": out, "targets": "[]", "actors": cfg.actors, "log": "none"}
    command = ["configs/precompute/miniature.yaml", *(f"{name}={value}" for name, value in settings.items())]
    subprocess.run([sys.executable, "-m", "cluster.precompute", *command], cwd=ROOT, check=True, capture_output=True)


def peer(name: str, cfg: PrecomputeBench, manifest_file: Path, root: Path, out: Path) -> None:
    """One of the others, in a process of its own."""
    asked = {"name": name, "manifest": str(manifest_file), "root": str(root), "actors": cfg.actors, "out": str(out)}
    code = f"from tools.bench import precompute; precompute.run_peer({json.dumps(asked)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def run_peer(asked: str) -> None:
    """The body of a peer's process."""
    told = json.loads(asked)
    utterances = manifest.read_manifest(Path(told["manifest"]))
    work = precompute_peers.plain_loop if told["name"] == "plain loop" else precompute_peers.ray_data
    work(utterances, Path(told["root"]), str(ENCODER), 4, 24, told["actors"], Path(told["out"]))


def beside_others(cfg: PrecomputeBench, utterances: Sequence[Utterance], root: Path) -> None:
    """Print the table of the three ways: whole commands, and what they take for next to nothing."""
    audio_s = sum(u.duration_s for u in utterances)
    seconds: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(cfg.passes):
            for count in (8, len(utterances)):
                part = Path(scratch) / f"{count}.jsonl"
                rows = [{**asdict(u), "audio": str(root / u.audio)} for u in utterances[:count]]
                part.write_text("".join(json.dumps(row) + "\n" for row in rows))
                for name in ("ours", "Ray Data", "plain loop"):
                    out = Path(scratch) / "out"
                    begun = time.perf_counter()
                    ours(cfg, part, out) if name == "ours" else peer(name, cfg, part, root, out)
                    seconds.setdefault((name, count), []).append(time.perf_counter() - begun)
                    shutil.rmtree(out)
    print(f"\n{len(utterances)} utterances, {audio_s / 3600:.2f} h, {cfg.actors} cores, {cfg.passes} passes, medians")
    print("| way | whole command, s | of it start and end | times real time without them | ours is faster by |")
    print("|---|---|---|---|---|")
    found = {which: statistics.median(times) for which, times in seconds.items()}
    for name in ("ours", "Ray Data", "plain loop"):
        whole, start = found[name, len(utterances)], found[name, 8]
        ratio, mine = whole / found["ours", len(utterances)], audio_s / (whole - start)
        print(f"| {name} | {whole:.1f} | {start:.1f} | {mine:.0f} | {ratio:.2f} |")


def main(argv: list[str]) -> None:
    if any(word in ("-h", "--help") for word in argv):
        print(f"usage: python -m tools.bench.precompute [key=value ...]\n\nkeys:\n{config.describe(PrecomputeBench)}")
        return
    if wrong := [word for word in argv if "=" not in word]:
        raise UserError(f"{wrong[0]!r} is not of the form key=value")
    cfg = config.from_mapping(PrecomputeBench, dict(word.split("=", 1) for word in argv), "tools.bench.precompute")
    path = Path(cfg.manifest)
    if not path.is_file():
        raise UserError(f"manifest {path} does not exist; make demo makes the miniature's corpus")
    utterances = manifest.read_manifest(path)[: cfg.utterances]
    if "inputs" in cfg.parts:
        theirs, own = inputs(2 * cfg.passes + 1)
        print(f"filter bank: {own:.0f} x real time, transformers' {theirs:.0f} x, {own / theirs:.1f} times", flush=True)
    if "busy" in cfg.parts:
        print(f"an encoder that sleeps, {len(utterances)} utterances, one decoding process")
        for speed in [cfg.speed] if cfg.speed else [100, 200, 400]:
            with tempfile.TemporaryDirectory() as folder:
                share, times = busy(utterances, path.resolve().parent, speed, Path(folder) / "set")
                print(f"  at {speed} x real time: busy {100 * share:.1f}%, {times:.0f} x real time", flush=True)
    if "writer" in cfg.parts:
        feats = [np.random.default_rng(i).normal(size=(308, 1024)).astype(np.float16) for i in range(400)]
        ways = (write_raw, write_ours, write_mosaic)
        rates = [[timed(way, feats) for way in ways] for _ in range(2 * cfg.passes + 1)]
        raw, own, mosaic = (statistics.median(column) for column in zip(*rates, strict=True))
        ratio = statistics.median(own / raw for raw, own, _ in rates)
        print(f"writer: {own:.0f} MB/s, raw write and fsync {raw:.0f} MB/s, ratio {ratio:.2f} (medians)")
        print(f"  MosaicML's own, without a hash: {mosaic:.0f} MB/s, ratio {mosaic / raw:.2f}", flush=True)
    if "others" in cfg.parts:
        beside_others(cfg, utterances, path.resolve().parent)


if __name__ == "__main__":
    run_command(main)
