"""Evaluation: every system answers every task about every utterance of the test splits; scores and a report.

    python -m sm_train.evaluate CONFIG.yaml [key=value ...]
    torchrun --nproc-per-node N -m sm_train.evaluate CONFIG.yaml [key=value ...]

Writes hypotheses.jsonl, results.json, report.html, timing.json and evaluation.json into the run folder, or ``out``, and
robustness.json where questions were asked in several wordings; any number of ranks gives the same hypotheses and
results. An evaluation that was interrupted goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sm_train import config, files
from sm_train.data import manifest
from sm_train.data.mds import file_digest
from sm_train.data.shards import DATASET
from sm_train.data.target_set import TargetSet
from sm_train.data.text import NORMALISERS
from sm_train.errors import UserError, exit_hard, run_command
from sm_train.models import checkpoints
from sm_train.models.embedding import require_embeddings
from sm_train.models.llm import FrozenLlm, LlmConfig
from sm_train.models.speech import CtcHead
from sm_train.prompts import LANGUAGES, read_prompts
from sm_train.runlog import say
from sm_train.scoring import mappers, showcase, table
from sm_train.scoring.answers import Question, Utterances, answer_all, merge, questions_about
from sm_train.scoring.decode import TRIMS
from sm_train.scoring.kept import Kept, Work
from sm_train.scoring.language import open_languages
from sm_train.scoring.mappers import Trained
from sm_train.scoring.report import build_report
from sm_train.scoring.scores import Hypothesis
from sm_train.scoring.systems import Cascade, Mapped, System, Topline
from sm_train.train import checkpoint
from sm_train.train.engines.base import place
from sm_train.train.engines.share import sharing

DONE, TIMING = "evaluation.json", "timing.json"
_GROUPS = ("train", "held_out")
_NOT_ANSWERS = ("out", "normaliser", "threads", "examples", "audio_root")
"""Keys that no answer follows from."""


@dataclass(frozen=True)
class EvaluateConfig:
    """What is compared, on what."""

    run: str | None = config.key(config.REQUIRED, "run folder of training; null: none, only references (with out)")
    out: str | None = config.key(None, "folder of results, hypotheses and report; null: the run's")
    checkpoint: str = config.key("best", "best | latest | a checkpoint folder")
    tuned: list[str] = config.key([], "run folders of tuning to compare with, each by its best checkpoint")
    other_template: bool = config.key(False, "also evaluate mappers that were tuned with another LLM or chat template")
    references: bool = config.key(True, "also topline, and the cascade if there is one")
    shards: str = config.key(config.REQUIRED, "shard set with the test splits")
    target: str = config.key(config.REQUIRED, "name of the LLM's target set in it")
    splits: list[str] = config.key(["test"], "splits to evaluate on")
    instructions: str = config.key(config.REQUIRED, "Parquet or JSONL file of tasks")
    prompts: str = config.key(config.REQUIRED, "YAML file of prompts by task")
    prompt_group: str = config.key("train", "which paraphrases: train | held_out | both (each question with each)")
    paraphrases: str = config.key("one", "of a group: one (chosen for each question by hash) | all")
    llm: LlmConfig = config.key(LlmConfig(), "the frozen LLM")
    cascade: str | None = config.key(None, "folder with ctc_head.safetensors for the cascade; null leaves it out")
    trim: str = config.key("change_point", "where stage 1's positions end: change_point | first_pad | none")
    normaliser: str = config.key("mms", "normaliser of WER, CER, exact match and accuracy: mms | none")
    lexicon: str | None = config.key(None, "JSON file of words by language, to tell languages; null: py3langid")
    max_new_tokens: int = config.key(150, "longest answer")
    batch_size: int = config.key(32, "prompts in one batch of decoding")
    seed: int = config.key(0, "seed of the choice of paraphrases")
    threads: int = config.key(2, "CPU threads")
    audio_root: str | None = config.key(None, "folder that the manifest's audio paths start at; null: no players")
    examples: int = config.key(4, "utterances of each split to show in the report")

    def __post_init__(self) -> None:
        if self.trim not in TRIMS:
            raise ValueError(f"trim is {self.trim!r}; it must be one of {', '.join(TRIMS)}")
        if self.prompt_group not in (*_GROUPS, "both"):
            raise ValueError(f"prompt_group is {self.prompt_group!r}; it must be train, held_out or both")
        if self.paraphrases not in ("one", "all"):
            raise ValueError(f"paraphrases is {self.paraphrases!r}; it must be one or all")
        if not self.run and not self.out:
            raise ValueError("run is null and so is out; name the folder that the results go to as out")
        if not self.run and not self.tuned and not self.references:
            raise ValueError("references is false and there is no run and none in tuned: nothing is left to evaluate")
        if self.normaliser not in NORMALISERS:
            raise ValueError(f"normaliser is {self.normaliser!r}; it must be one of {', '.join(NORMALISERS)}")
        for name in ("max_new_tokens", "batch_size", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of paraphrases that every question is asked with."""
        return _GROUPS if self.prompt_group == "both" else (self.prompt_group,)

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return Path(self.out or self.run or "")


def run(cfg: EvaluateConfig) -> None:
    """Evaluate, score, report; an evaluation that is there already is only shown."""
    folder, trained = cfg.folder, read_trained(cfg)
    if cfg.llm.device_map and place()[1] > 1:
        raise UserError(f"llm.device_map is {cfg.llm.device_map!r}, for one rank alone; there are {place()[1]}")
    asked = _described(cfg, trained)
    outputs = [folder / name for name in (DONE, "results.json", "hypotheses.jsonl", "report.html")]
    if all(path.exists() for path in outputs) and files.read_json(folder / DONE).items() >= asked.items():
        say(f"{folder}: evaluated already")
    else:
        _evaluate(cfg, trained, asked)
    if place()[0] == 0:
        table.show(folder)
        print(f"report: {folder / 'report.html'}", flush=True)


def read_trained(cfg: EvaluateConfig) -> list[Trained]:
    """The mappers that are compared.

    Raises:
        UserError: a run or its checkpoint is not there.
    """
    runs = [*([(Path(cfg.run), cfg.checkpoint)] if cfg.run else []), *((Path(tuned), "best") for tuned in cfg.tuned)]
    return mappers.read_all([(run, checkpoint.find(run, name)) for run, name in runs])


def _described(cfg: EvaluateConfig, trained: Sequence[Trained]) -> dict[str, Any]:
    """What results and report follow from: config, LLM, mappers, shards, targets, tasks, prompts, words."""
    target, llm = Path(cfg.shards) / "targets" / cfg.target, checkpoints.resolve(cfg.llm.path, cfg.llm.revision, "LLM")
    paths = {
        "shards": Path(cfg.shards) / DATASET,
        "targets": target / DATASET,
        "instructions": Path(cfg.instructions),
        "prompts": Path(cfg.prompts),
        "lexicon": Path(cfg.lexicon or ""),
        "cascade": Path(cfg.cascade or "") / "ctc_head.safetensors",
        "cascade_vocabulary": Path(cfg.cascade or "") / "ctc_vocabulary.json",
        "tokenizer": llm / "tokenizer.json",
    }
    digests = {name: file_digest(path) if path.is_file() else "" for name, path in paths.items()}
    settings = config.to_mapping(replace(cfg, llm=replace(cfg.llm, stage_to=None)))
    mappers_here = {one.name: one.digests() for one in trained}
    return {"settings": settings, "mappers": mappers_here, "llm": checkpoints.fingerprint(llm), **digests}


def _kept(cfg: EvaluateConfig, asked: Mapping[str, Any], rank: int) -> Kept:
    """The answers so far, whatever the report shows and however many threads there are."""
    settings = {name: value for name, value in asked["settings"].items() if name not in _NOT_ANSWERS}
    return Kept(cfg.folder, {**asked, "settings": settings}, rank)


def _evaluate(cfg: EvaluateConfig, trained: Sequence[Trained], asked: Mapping[str, Any]) -> None:
    """Every rank answers its batches; rank 0 merges them, scores and reports."""
    if place()[0] == 0:
        what = f"evaluating {len(trained)} mapper(s) on {', '.join(cfg.splits)}, loading models"
        print(f"{cfg.folder}: {what}", file=sys.stderr, flush=True)
    with sharing(cfg.llm.device, cfg.threads, asked) as (rank, world_size):
        utterances = Utterances(Path(cfg.shards), cfg.splits)
        questions = _questions(cfg, utterances)
        asked_for = {question.task.target_lang for question in questions if question.task.task == "st"}
        languages = open_languages(cfg.lexicon, asked_for, LANGUAGES)
        llm, systems = _systems(cfg, trained)
        kept, size = _kept(cfg, asked, rank), cfg.batch_size
        if rank == 0:
            about = f"{len(utterances.rows)} utterances, {len(questions)} questions, {len(systems)} system(s)"
            share = f", shared by {world_size} ranks" if world_size > 1 else ""
            print(f"evaluate: models loaded; {about}{share}", file=sys.stderr, flush=True)
        answer_all(systems, llm, utterances, questions, cfg.max_new_tokens, size, kept, (rank, world_size))
    if rank == 0:
        hypotheses, work = merge(systems, utterances, questions, size, kept)
        (cfg.folder / DONE).unlink(missing_ok=True)
        table.write(cfg.folder, hypotheses, cfg.normaliser, languages)
        mapped = next((system for system in systems if isinstance(system, Mapped)), None)
        write_report(cfg, cfg.folder, hypotheses, trained, utterances, mapped)
        _write_work(cfg.folder, asked, work)
        kept.remove()


def _questions(cfg: EvaluateConfig, utterances: Utterances) -> list[Question]:
    tasks, prompts = manifest.read_instructions(Path(cfg.instructions)), read_prompts(Path(cfg.prompts))
    return questions_about(utterances, tasks, prompts, cfg.groups, cfg.seed, cfg.paraphrases)


def _systems(cfg: EvaluateConfig, trained: Sequence[Trained]) -> tuple[FrozenLlm, list[System]]:
    """The LLM and all that is compared, in the order of the results."""
    targets = TargetSet(Path(cfg.shards), cfg.target)
    read_here = {**files.read_json(Path(cfg.shards) / DATASET), **targets.contract}
    for one in trained:
        one.require_frozen(read_here)
    require_embeddings(checkpoints.resolve(cfg.llm.path, cfg.llm.revision, "LLM"), targets)
    llm = FrozenLlm(cfg.llm)
    for one in trained if not cfg.other_template else []:
        one.require_template(llm, "evaluate it with that template, or set other_template: true")
    systems: list[System] = [Topline(llm, targets.contract["normaliser"])] if cfg.references else []
    if cfg.references and cfg.cascade:
        systems.append(Cascade(llm, CtcHead(Path(cfg.cascade))))
    return llm, [*systems, *(one.as_system(targets, cfg.trim, llm.device) for one in trained)]


def write_report(
    cfg: EvaluateConfig, folder: Path, hypotheses: Sequence[Hypothesis], trained: Sequence[Trained],
    utterances: Utterances | None, mapped: Mapped | None,
) -> None:  # fmt: skip
    """report.html from the results and hypotheses in ``folder``.

    Without ``utterances`` it has the texts that hypotheses hold and no players, without ``mapped`` no picture.
    """
    rows = utterances.rows if utterances else showcase.rows_of(hypotheses)
    shown = showcase.examples(rows, hypotheses, cfg.audio_root if utterances else None, cfg.examples)
    picture = showcase.picture(utterances, mapped) if utterances and mapped else None
    pretrained = next((one.run for one in trained if not one.is_tuned), None)
    build_report(folder, shown, picture, pretrained, [(one.name, one.run) for one in trained if one.is_tuned])


def _write_work(folder: Path, asked: Mapping[str, Any], work: Mapping[str, Work]) -> None:
    """What the answers took: tokens into evaluation.json, which ends an evaluation, and seconds into timing.json."""
    of_systems = {name: asdict(done) for name, done in work.items()}
    seconds = {
        name: {key: round(done.pop(key), 3) for key in ("map_s", "decode_s")} for name, done in of_systems.items()
    }
    files.write_json(folder / TIMING, seconds)
    files.write_json(folder / DONE, {**asked, "llm_tokens": of_systems})


def main(argv: list[str]) -> None:
    run(config.load(EvaluateConfig, argv, "sm_train.evaluate"))
    if place()[1] > 1:
        exit_hard()


if __name__ == "__main__":
    run_command(main)
