"""Evaluation: every system answers every task about every utterance of the test splits; scores and a report.

    python -m sm_train.evaluate CONFIG.yaml [key=value ...]

Writes results.json, hypotheses.jsonl and report.html into the run folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from sm_train import config, files
from sm_train.data import manifest
from sm_train.data.mds import file_digest
from sm_train.data.shards import DATASET, require_same
from sm_train.data.target_set import TargetSet
from sm_train.data.text import NORMALISERS
from sm_train.errors import UserError, run_command
from sm_train.models.llm import FrozenLlm, LlmConfig
from sm_train.models.mapper import SpeechMapper
from sm_train.models.speech import CtcHead
from sm_train.prompts import read_prompts
from sm_train.scoring import scores, showcase
from sm_train.scoring.answers import Utterances, answer_all, questions_about
from sm_train.scoring.decode import TRIMS
from sm_train.scoring.report import build_report
from sm_train.scoring.systems import STAGE_1, Cascade, Mapped, System, Topline
from sm_train.train import checkpoint

DONE = "evaluation.json"
FROZEN = ("encoder_hash", "layer", "pool", "tokenizer_hash", "pad_id")


@dataclass(frozen=True)
class EvaluateConfig:
    """What is compared, on what."""

    run: str = config.key(config.REQUIRED, "run folder of pretraining; the results go there")
    checkpoint: str = config.key("best", "best | latest | a checkpoint folder")
    shards: str = config.key(config.REQUIRED, "shard set with the test splits")
    target: str = config.key(config.REQUIRED, "name of the LLM's target set in it")
    splits: list[str] = config.key(["test"], "splits to evaluate on")
    instructions: str = config.key(config.REQUIRED, "Parquet or JSONL file of tasks")
    prompts: str = config.key(config.REQUIRED, "YAML file of prompts by task")
    prompt_group: str = config.key("train", "which paraphrases: train | held_out")
    llm: LlmConfig = config.key(LlmConfig(), "the frozen LLM")
    cascade: str | None = config.key(None, "folder with ctc_head.safetensors for the cascade; null leaves it out")
    trim: str = config.key("change_point", "where the mapped positions end: change_point | first_pad | none")
    normaliser: str = config.key("mms", "normaliser of WER, CER, exact match and accuracy: mms | none")
    max_new_tokens: int = config.key(150, "longest answer")
    batch_size: int = config.key(32, "prompts in one batch of decoding")
    seed: int = config.key(0, "seed of the choice of paraphrases")
    threads: int = config.key(2, "CPU threads")
    audio_root: str | None = config.key(None, "folder that the manifest's audio paths start at; null: no players")
    examples: int = config.key(4, "utterances of each split to show in the report")

    def __post_init__(self) -> None:
        if self.trim not in TRIMS:
            raise ValueError(f"trim is {self.trim!r}; it must be one of {', '.join(TRIMS)}")
        if self.normaliser not in NORMALISERS:
            raise ValueError(f"normaliser is {self.normaliser!r}; it must be one of {', '.join(NORMALISERS)}")
        for name in ("max_new_tokens", "batch_size", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def run(cfg: EvaluateConfig) -> None:
    """Evaluate, score, report; an evaluation that is there already is only shown."""
    folder = Path(cfg.run)
    found = find_checkpoint(folder, cfg.checkpoint)
    asked = _described(cfg, found)
    outputs = [folder / name for name in (DONE, "results.json", "hypotheses.jsonl", "report.html")]
    if all(path.exists() for path in outputs) and files.read_json(folder / DONE) == asked:
        print(f"{folder}: evaluated already")
    else:
        (folder / DONE).unlink(missing_ok=True)
        _evaluate(cfg, folder, found)
        files.write_json(folder / DONE, asked)
    print(scores.table(scores.read_results(folder / "results.json")))
    print(f"report: {folder / 'report.html'}")


def _described(cfg: EvaluateConfig, found: Path) -> dict[str, str]:
    """What an evaluation's results follow from: config, mapper, shards, targets, tasks, prompts."""
    target = Path(cfg.shards) / "targets" / cfg.target
    paths = {
        "mapper": found / "mapper.safetensors",
        "shards": Path(cfg.shards) / DATASET,
        "targets": target / DATASET,
        "instructions": Path(cfg.instructions),
        "prompts": Path(cfg.prompts),
    }
    digests = {name: file_digest(path) if path.is_file() else "" for name, path in paths.items()}
    return {"config": config.fingerprint(cfg), **digests}


def find_checkpoint(run: Path, name: str) -> Path:
    """A run's checkpoint folder: best, latest, or a path.

    Raises:
        UserError: there is none.
    """
    found = {"best": checkpoint.best, "latest": checkpoint.latest}.get(name, lambda _run: Path(name))(run)
    if found is None or not (found / "mapper.safetensors").exists():
        raise UserError(f"run {run} has no checkpoint {name!r}; pretrain it first, or name a checkpoint folder")
    return found


def _evaluate(cfg: EvaluateConfig, folder: Path, found: Path) -> None:
    torch.set_num_threads(cfg.threads)
    folder.mkdir(parents=True, exist_ok=True)
    targets = TargetSet(Path(cfg.shards), cfg.target)
    utterances = Utterances(Path(cfg.shards), cfg.splits)
    tasks, prompts = manifest.read_instructions(Path(cfg.instructions)), read_prompts(Path(cfg.prompts))
    questions = questions_about(utterances, tasks, prompts, cfg.prompt_group, cfg.seed)
    trained_on = files.read_json(found / "state.json")["contract"]
    read_here = {**files.read_json(Path(cfg.shards) / DATASET), **targets.contract}
    fields = [name for name in FROZEN if name in trained_on]
    require_same(
        {name: read_here[name] for name in fields},
        {name: trained_on[name] for name in fields},
        str(found),
        "evaluate on features and targets of the encoder and LLM that the mapper was trained for",
    )
    llm = FrozenLlm(cfg.llm)
    llm.require_embeddings(targets)
    mapper = SpeechMapper.from_pretrained(found)
    mapped = Mapped(mapper, targets, cfg.trim, llm.device, STAGE_1)
    systems: list[System] = [Topline(llm, targets.contract["normaliser"])]
    if cfg.cascade:
        systems.append(Cascade(llm, CtcHead(Path(cfg.cascade))))
    systems.append(mapped)
    hypotheses = answer_all(systems, llm, utterances, questions, cfg.max_new_tokens, cfg.batch_size)
    scores.write_hypotheses(folder / "hypotheses.jsonl", hypotheses)
    scores.write_results(folder / "results.json", scores.score(hypotheses, cfg.normaliser))
    shown = showcase.examples(utterances, hypotheses, cfg.audio_root, cfg.examples)
    metrics = folder / "metrics.jsonl"
    build_report(folder, shown, showcase.picture(utterances, mapped), metrics if metrics.exists() else None)


def main(argv: list[str]) -> None:
    run(config.load(EvaluateConfig, argv, "sm_train.evaluate"))


if __name__ == "__main__":
    run_command(main)
