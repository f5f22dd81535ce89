"""Small real jobs: a part of a plan's corpus through its own stages, by their own commands, each timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sm_train.data import manifest
from sm_train.errors import UserError
from sm_train.records import Utterance
from tools.plan_capacity import shapes
from tools.plan_capacity.settings import PlanConfig, Stage
from tools.plan_capacity.shapes import Shapes


@dataclass(frozen=True)
class Sizes:
    """How much of a corpus a job takes; utterances of each split."""

    train: int
    valid: int
    test: int


@dataclass(frozen=True)
class Place:
    """A job's folder, and the plan of what is done in it."""

    folder: Path
    cfg: PlanConfig
    shapes: Shapes

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    @property
    def targets(self) -> Path:
        return self.shards / "targets" / self.shapes.pretrain.target


def carve(cfg: PlanConfig, folder: Path, sizes: Sizes) -> Place:
    """A corpus of some of the plan's utterances, spread over all of it, and the plan for it.

    Raises:
        UserError: the plan names no manifest and no instructions, or they are not there.
    """
    if not cfg.corpus.manifest or not cfg.corpus.instructions:
        raise UserError("corpus.manifest and corpus.instructions are not set; a real job needs audio and tasks")
    source, read = Path(cfg.corpus.manifest), shapes.read(cfg)
    chosen = _choose(manifest.read_manifest(source), read, sizes)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{**asdict(u), "audio": str(source.resolve().parent / u.audio)} for u in chosen]
    paths = [folder / name for name in ("manifest.jsonl", "instructions.jsonl")]
    kept = {u.id for u in chosen}
    tasks = [asdict(t) for t in manifest.read_instructions(Path(cfg.corpus.instructions)) if t.utterance_id in kept]
    for path, lines in zip(paths, (rows, tasks), strict=True):
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    made = replace(cfg, corpus=replace(cfg.corpus, manifest=str(paths[0]), instructions=str(paths[1])), hours=0.0)
    words = {
        "precompute": [f"manifest={paths[0]}", f"out={folder / 'shards'}"],
        "pretrain": [f"run={folder / 'stage1'}", f"shards={folder / 'shards'}"],
        "tune": [f"run={folder / 'stage2'}", f"mapper={folder / 'stage1'}", f"shards={folder / 'shards'}"],
        "evaluate": [f"run={folder / 'stage1'}", "tuned=[]", f"shards={folder / 'shards'}", f"instructions={paths[1]}"],
    }
    return with_words(Place(folder, made, read), words)


def _choose(utterances: Sequence[Utterance], read: Shapes, sizes: Sizes) -> list[Utterance]:
    wanted = dict.fromkeys(read.evaluate.splits, sizes.test)
    wanted |= dict.fromkeys(read.pretrain.valid_splits, sizes.valid)
    wanted |= dict.fromkeys(read.pretrain.splits, sizes.train)
    chosen: list[Utterance] = []
    for split, count in wanted.items():
        there = [u for u in utterances if u.split == split]
        if not there:
            raise UserError(f"the plan's manifest has no utterance of split {split!r}")
        count = min(count, len(there))
        chosen += [there[i * len(there) // count] for i in range(count)]
    return chosen


def with_words(place: Place, words: dict[str, list[str]]) -> Place:
    """The same place with more overrides of its stages."""
    stages = {}
    for name, more in words.items():
        stage: Stage = getattr(place.cfg, name)
        stages[name] = replace(stage, words=[*stage.words, *more])
    cfg = replace(place.cfg, **stages)
    return Place(place.folder, cfg, shapes.read(cfg))


def command(place: Place, stage: str) -> list[str]:
    """The command line of a stage, as a person would type it."""
    if stage == "retarget":
        return _retarget(place)
    chosen: Stage = getattr(place.cfg, stage)
    argv, gpus = [chosen.file, *chosen.words], place.cfg.gpus_of(stage)
    if stage == "precompute":
        module = ["sm_train.precompute"] if gpus == 1 else ["cluster.precompute"]
        return [sys.executable, "-m", *module, *argv, "targets=[]", *([f"actors={gpus}"] if gpus > 1 else [])]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)] if gpus > 1 else []
    return [sys.executable, *launcher, "-m", f"sm_train.{stage}", *argv]


def _retarget(place: Place) -> list[str]:
    name = place.shapes.pretrain.target
    for target in place.shapes.precompute.targets:
        if target.name == name:
            given = {"--revision": target.revision, "--pad-token": target.pad_token, "--normaliser": target.normaliser}
            options = [word for option, value in given.items() if value for word in (option, value)]
            return [sys.executable, "-m", "cluster.retarget", str(place.shards), "--llm", target.llm, "--name", name,
                    *options, "--instructions", str(place.cfg.corpus.instructions)]  # fmt: skip
    raise UserError(f"precompute's targets have no {name!r}, which pretrain.target names")


def timed(place: Place, stage: str) -> float:
    """Run a stage to its end; its wall seconds.

    Raises:
        UserError: it failed; its last line says why.
    """
    begun = time.perf_counter()
    done = subprocess.run(command(place, stage), capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begun
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"{stage} ended with {done.returncode}: {last.removeprefix('error: ')}")
    return seconds


def bytes_of(folder: Path) -> int:
    """Bytes of all files below a folder, links left out."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def load() -> float:
    """The machine's load of the last minute, on all its CPUs: processes at work."""
    return os.getloadavg()[0]
