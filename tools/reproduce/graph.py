"""The work of a world as a small graph: corpus -> precompute -> tasks -> train (row, seed) -> evaluate (row, seed).

ROOT/corpus  ROOT/shards/ENCODER  ROOT/rows/ROW/SEED  ROOT/evaluations/ROW/SEED  ROOT/wordings/ROW/SEED  ROOT/logs
ROOT/done
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sm_train import config
from sm_train.data.mds import file_digest
from sm_train.encoding.settings import PrecomputeConfig
from sm_train.evaluate import EvaluateConfig
from sm_train.pretrain import PretrainConfig
from sm_train.tune import TuneConfig
from tools.miniature.corpus import CorpusConfig
from tools.reproduce.world import MAIN, StageConfig, WorldConfig

REFERENCES = "references"
_SCHEMAS: dict[str, type[Any]] = {
    "tools.miniature.corpus": CorpusConfig,
    "sm_train.precompute": PrecomputeConfig,
    "sm_train.pretrain": PretrainConfig,
    "sm_train.tune": TuneConfig,
    "sm_train.evaluate": EvaluateConfig,
}


@dataclass(frozen=True, slots=True)
class Item:
    """One command, and what must be there before it."""

    name: str
    kind: str
    command: tuple[str, ...]
    """A module and its words: ``python -m`` comes before it."""
    needs: tuple[str, ...]
    makes: Path
    """A file that is there once the command is through."""
    inputs: tuple[Path, ...]
    """Files that the result follows from, besides what comes from ``needs``."""
    keeps: Path | None = None
    """A folder that the command goes on in, so that another command needs another one."""


@dataclass(frozen=True)
class Places:
    """Where things of a world lie."""

    root: Path

    @property
    def corpus(self) -> Path:
        return self.root / "corpus"

    def shards(self, encoder: str) -> Path:
        """An encoder's shard set."""
        return self.root / "shards" / encoder

    def run(self, row: str, seed: int) -> Path:
        """A row's run folder of training."""
        return self.root / "rows" / row / str(seed)

    def evaluation(self, row: str, seed: int) -> Path:
        """A row's hypotheses and scores."""
        return self.root / "evaluations" / row / str(seed)

    def wordings(self, row: str, seed: int) -> Path:
        """The same on every held-out wording of each question."""
        return self.root / "wordings" / row / str(seed)


def items_of(world: WorldConfig, root: Path, rows: Collection[str], seeds: Collection[int]) -> list[Item]:
    """Everything to be done for some rows and seeds, in the order it is wanted in; what is needed stands before.

    One seed of every main row comes first, then the other seeds, then all wordings, then the ablations: a run that is
    cut off has a whole table for fewer seeds.
    """
    made = _Maker(world, Places(root))
    main = [row for row in rows if world.rows[row].group == MAIN]
    for group in (main, [row for row in rows if row not in main]):
        for seed in seeds:
            for row in group:
                if world.rows[row].kind == "reference":
                    made.references()
                elif seed in world.seeds_of(row):
                    made.evaluate(row, seed)
        for seed in [seed for seed in seeds if seed in world.wordings.seeds and group is main]:
            for row in group:
                if world.rows[row].kind == "reference":
                    made.references(wordings=True)
                elif seed in world.seeds_of(row):
                    made.evaluate(row, seed, wordings=True)
    return list(made.items.values())


class _Maker:
    """Adds items, each once, those that it needs before it."""

    def __init__(self, world: WorldConfig, places: Places) -> None:
        self.world, self.places = world, places
        self.items: dict[str, Item] = {}
        precompute = _load(PrecomputeConfig, world.precompute, "manifest=unknown", "out=unknown")
        pretrain = _load(PretrainConfig, world.pretrain, "run=unknown")
        self.target: str = precompute.targets[0].name
        self.shape = f"shape={json.dumps(config.to_mapping(pretrain.mapper))}"
        self.llms = tuple(_weights(target.llm) for target in precompute.targets)

    def _add(self, item: Item) -> str:
        if item.name not in self.items and (schema := _SCHEMAS.get(item.command[0])):
            config.load(schema, list(item.command[1:]), item.name)  # what is misspelt is said before anything begins
        self.items.setdefault(item.name, item)
        return item.name

    def corpus(self) -> str:
        stage, out = self.world.corpus, self.places.corpus
        command = ("tools.miniature.corpus", stage.file, *stage.words, f"out={out}")
        return self._add(Item("corpus", "corpus", command, (), out / "_DONE.json", (Path(stage.file),)))

    def tasks(self, encoder: str) -> str:
        """Features, targets and tasks of an encoder."""
        if (name := f"tasks-{encoder}") in self.items:
            return name
        stage, out, corpus = self.world.precompute, self.places.shards(encoder), self.places.corpus
        words = (*stage.words, *self.world.encoders[encoder], f"manifest={corpus / 'manifest.parquet'}", f"out={out}")
        of_encoder = _load(PrecomputeConfig, stage, *words).encoder.path
        inputs = tuple(filter(Path.is_file, (Path(stage.file), _weights(of_encoder), *self.llms)))
        features = self._add(
            Item(f"precompute-{encoder}", "precompute", ("sm_train.precompute", stage.file, *words), (self.corpus(),),
                 out / "dataset.json", inputs)
        )  # fmt: skip
        command = ("cluster.retarget", str(out), "--name", self.target, "--instructions",
                   str(corpus / "instructions.parquet"))  # fmt: skip
        made = out / "targets" / self.target / "tasks.parquet"
        return self._add(Item(name, "tasks", command, (features,), made, ()))

    def train(self, row: str, seed: int) -> str:
        asked, world = self.world.rows[row], self.world
        stage = world.pretrain if asked.kind == "pretrain" else world.tune
        needs, origin = [self.tasks(world.encoder_of(row))], list[str]()
        if asked.kind == "tune":
            origin = ["mapper=scratch", self.shape]
            if asked.base:
                trained = world.trained(asked.base)
                needs.append(self.train(trained, seed))
                origin = [f"mapper={self.places.run(trained, seed)}"]
        run = self.places.run(row, seed)
        words = [*stage.words, *origin, *asked.words, *self._data(row), f"run={run}", f"seed={seed}"]
        command = (f"sm_train.{asked.kind}", stage.file, *words)
        inputs = _with_prompts(stage)
        return self._add(
            Item(f"{row}-{seed}", asked.kind, command, tuple(needs), run / "checkpoints" / "latest", inputs, keeps=run)
        )

    def evaluate(self, row: str, seed: int, *, wordings: bool = False) -> str:
        trained = self.world.trained(row)
        asked = [*self.world.rows[row].evaluate, f"run={self.places.run(trained, seed)}", "references=false"]
        return self._evaluate(row, seed, asked, self.train(trained, seed), wordings)

    def references(self, *, wordings: bool = False) -> str:
        encoder = next(iter(self.world.encoders))
        return self._evaluate(REFERENCES, 0, ["run=null", "references=true"], self.tasks(encoder), wordings)

    def _evaluate(self, row: str, seed: int, asked: Sequence[str], needed: str, wordings: bool) -> str:
        stage, corpus, splits = self.world.evaluate, self.places.corpus, list(self.world.voices.values())
        out, group = self.places.evaluation(row, seed), ["prompt_group=both"]
        if wordings:
            splits = [self.world.voices[self.world.wordings.voices]]
            out, group = self.places.wordings(row, seed), ["prompt_group=held_out", "paraphrases=all"]
        own = [f"out={out}", "tuned=[]", *group, f"splits=[{','.join(splits)}]"]
        own += [f"instructions={corpus / 'instructions.parquet'}", f"audio_root={corpus}", "threads=1"]
        lexicon = [f"lexicon={corpus / 'lexicon.json'}"]
        words = [*stage.words, *lexicon, *asked, *own, *self._data(row)]
        command = ("sm_train.evaluate", stage.file, *words)
        name = f"{row}-{seed}-evaluate" if row != REFERENCES else REFERENCES
        name = f"{name.removesuffix('-evaluate')}-wordings" if wordings else name
        return self._add(Item(name, "evaluate", command, (needed,), out / "evaluation.json", _with_prompts(stage)))

    def _data(self, row: str) -> Iterator[str]:
        encoder = next(iter(self.world.encoders)) if row == REFERENCES else self.world.encoder_of(row)
        yield f"shards={self.places.shards(encoder)}"
        yield f"target={self.target}"


def _load(schema: type[Any], stage: StageConfig, *words: str) -> Any:
    return config.load(schema, [stage.file, *stage.words, *words], "tools.reproduce")


def _weights(folder: str) -> Path:
    return Path(folder) / "model.safetensors"


def _with_prompts(stage: StageConfig) -> tuple[Path, ...]:
    words = [word.removeprefix("prompts=") for word in stage.words if word.startswith("prompts=")]
    prompts = Path(words[-1] if words else config.read_yaml(Path(stage.file)).get("prompts", ""))
    return (Path(stage.file), *([prompts] if prompts.is_file() else []))


def hashes(items: Sequence[Item]) -> dict[str, str]:
    """By name a hash of all that an item's result follows from: its command, its inputs, and what it needs."""
    found: dict[str, str] = {}
    for item in items:
        inputs = {str(path): _digest(path) for path in item.inputs}
        found[item.name] = config.fingerprint(
            {"command": item.command, "inputs": inputs, "needs": [found[name] for name in item.needs]}
        )
    return found


def _digest(path: Path) -> str:
    """Of a YAML file what it says, so that a comment changes nothing; of any other its bytes."""
    return config.fingerprint(config.read_yaml(path)) if path.suffix == ".yaml" else file_digest(path)
