"""What is compared: a YAML file in configs/reproduce says which rows there are, on which data, with which seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sm_train import config
from sm_train.errors import UserError

FOLDER = Path("configs/reproduce")
KINDS = ("reference", "pretrain", "tune", "again")
STAGES = ("corpus", "precompute", "pretrain", "tune", "evaluate")
MAIN, ABLATION = "main", "ablation"
PROMPTS = ("train", "held_out")
METRICS = {
    "asr WER": ("ASR WER", 1, False),
    "asr WER, no LLM": ("WER, no LLM", 1, False),
    "st-fr BLEU": ("fr BLEU", 1, True),
    "st-fr chrF": ("fr chrF", 1, True),
    "st-de BLEU": ("de BLEU", 1, True),
    "st-de chrF": ("de chrF", 1, True),
    "st in language": ("in language", 3, True),
    "sqa accuracy": ("SQA accuracy", 3, True),
}
"""The columns: their titles, digits, whether more is better."""


@dataclass(frozen=True)
class StageConfig:
    """A stage's own config, as its command would get it."""

    file: str = config.key(config.REQUIRED, "the stage's YAML file")
    words: list[str] = config.key([], "its overrides, as [loop.steps=1000]; folders and seed are given by the runner")


@dataclass(frozen=True)
class RowConfig:
    """A system: how it is trained, with how many seeds, and how it is heard."""

    title: str = config.key(config.REQUIRED, "as the table calls it")
    kind: str = config.key(
        config.REQUIRED, "pretrain | tune | again (base's mapper, evaluated in another way) | reference (no mapper: "
        "the row's key is topline or cascade)"
    )  # fmt: skip
    base: str = config.key("", "the row whose mapper it starts from; a tune without one starts from scratch")
    group: str = config.key(MAIN, "main | ablation: trained after all seeds of the main rows")
    words: list[str] = config.key([], "overrides of its training")
    evaluate: list[str] = config.key([], "overrides of its evaluation")
    encoder: str = config.key("", "whose features; empty: the first's, or base's")
    seeds: list[int] = config.key([], "[]: the world's")


@dataclass(frozen=True)
class ClaimConfig:
    """What is to be seen in the table: a's figure less b's is above a bound, or below it."""

    says: str = config.key(config.REQUIRED, "the claim, as a sentence without its full stop")
    a: str = config.key(config.REQUIRED, "a row")
    b: str = config.key(config.REQUIRED, "another row")
    columns: list[str] = config.key(config.REQUIRED, f"of the table: {', '.join(METRICS)}")
    prompts: list[str] = config.key(["held_out"], "train, held_out")
    voices: list[str] = config.key([], "names of voices; [] for all")
    above: float | None = config.key(None, "a - b is above this: 0 if neither is given")
    below: float | None = config.key(None, "a - b is below this")


@dataclass(frozen=True)
class WordingsConfig:
    """Main rows that are asked every question in every held-out wording: how much the wording matters."""

    seeds: list[int] = config.key([], "of these seeds; [] asks none")
    voices: str = config.key("known voices", "one name of voices")


@dataclass(frozen=True)
class WorldConfig:
    """A table: data, stages, rows, claims."""

    seeds: list[int] = config.key([0, 1, 2], "seeds of every row that names none")
    corpus: StageConfig = config.key(StageConfig(), "tools.miniature.corpus")
    precompute: StageConfig = config.key(StageConfig(), "sm_train.precompute")
    pretrain: StageConfig = config.key(StageConfig(), "sm_train.pretrain")
    tune: StageConfig = config.key(StageConfig(), "sm_train.tune")
    evaluate: StageConfig = config.key(StageConfig(), "sm_train.evaluate")
    encoders: dict[str, list[str]] = config.key({"ctc": []}, "name: overrides of precompute")
    voices: dict[str, str] = config.key({"known voices": "test", "held-out voices": "test_voices"}, "name: split")
    rows: dict[str, RowConfig] = config.key(config.REQUIRED, "key: row, in the order of the table; see RowConfig")
    wordings: WordingsConfig = config.key(WordingsConfig(), "see WordingsConfig")
    claims: list[ClaimConfig] = config.key([], "see ClaimConfig")
    out: str = config.key("", "folder of everything that is made; empty: runs/reproduce/WORLD")

    def __post_init__(self) -> None:
        if not self.seeds or not self.encoders or not self.voices:
            raise ValueError("seeds, encoders and voices each need one entry or more")
        if self.wordings.seeds and self.wordings.voices not in self.voices:
            raise ValueError(f"wordings.voices is {self.wordings.voices!r}; voices has {', '.join(self.voices)}")
        for key, row in self.rows.items():
            _check_row(key, row, list(self.rows), self)
        for claim in self.claims:
            _check_claim(claim, self)

    def seeds_of(self, key: str) -> list[int]:
        """A row's seeds; a reference has one result, whatever the seed."""
        row = self.rows[key]
        return [0] if row.kind == "reference" else list(row.seeds or self.seeds)

    def encoder_of(self, key: str) -> str:
        """The encoder whose features a row is trained on."""
        row = self.rows[key]
        return row.encoder or (self.encoder_of(row.base) if row.base else next(iter(self.encoders)))

    def trained(self, key: str) -> str:
        """The row whose training gave a row's mapper: its own, or base's if it is evaluated again."""
        row = self.rows[key]
        return self.trained(row.base) if row.kind == "again" else key


def _check_row(key: str, row: RowConfig, keys: Sequence[str], world: WorldConfig) -> None:
    if row.kind not in KINDS:
        raise ValueError(f"rows.{key}.kind is {row.kind!r}; it must be one of {', '.join(KINDS)}")
    if row.group not in (MAIN, ABLATION):
        raise ValueError(f"rows.{key}.group is {row.group!r}; it must be {MAIN} or {ABLATION}")
    if row.kind == "reference" and key not in ("topline", "cascade"):
        raise ValueError(f"rows.{key} is a reference; those known are topline and cascade")
    if row.base and row.base not in keys[: keys.index(key)]:
        raise ValueError(f"rows.{key}.base is {row.base!r}, which is no row above it")
    if (row.kind == "again" and not row.base) or (row.kind in ("pretrain", "reference") and row.base):
        raise ValueError(f"rows.{key}: kind again needs a base, pretrain and reference have none")
    if row.encoder and row.encoder not in world.encoders:
        raise ValueError(f"rows.{key}.encoder is {row.encoder!r}; encoders has {', '.join(world.encoders)}")
    if row.base and (missing := set(world.seeds_of(key)) - set(world.seeds_of(row.base))):
        raise ValueError(f"rows.{key} has seed {min(missing)}, which its base {row.base} has not")


def _check_claim(claim: ClaimConfig, world: WorldConfig) -> None:
    known = {"a": list(world.rows), "b": list(world.rows), "columns": list(METRICS), "prompts": list(PROMPTS),
             "voices": list(world.voices)}  # fmt: skip
    for name, choices in known.items():
        value = getattr(claim, name)
        for one in [value] if isinstance(value, str) else value:
            if one not in choices:
                there = ", ".join(map(repr, choices))
                raise ValueError(f"claim {claim.says!r}: {name} names {one!r}; those known are {there}")
    if claim.above is not None and claim.below is not None:
        raise ValueError(f"claim {claim.says!r}: give above or below, not both")


def read(name: str, words: Sequence[str]) -> WorldConfig:
    """The world of a name, or in a YAML file.

    Raises:
        UserError: there is none, or something in it is wrong.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"world {name!r} is not there; {FOLDER} has {', '.join(p.stem for p in FOLDER.glob('*.yaml'))}")
    found = config.load(WorldConfig, [str(path), *words], "tools.reproduce --world")
    for stage in STAGES:
        if not Path(file := getattr(found, stage).file).is_file():
            raise UserError(f"{path}: {stage}.file is {file}, which does not exist")
    return found


def folder_of(name: str, world: WorldConfig) -> Path:
    """Where everything of a world is made."""
    return Path(world.out or f"runs/reproduce/{Path(name).stem}")
