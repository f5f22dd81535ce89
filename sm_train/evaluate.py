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
from sm_train.data.target_set import TargetSet
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
        for name in ("max_new_tokens", "batch_size", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def run(cfg: EvaluateConfig) -> None:
    """Evaluate, score, report; an evaluation that is there already is only shown."""
    folder = Path(cfg.run)
    found = find_checkpoint(folder, cfg.checkpoint)
    asked = {"config": config.fingerprint(cfg), "checkpoint": files.read_json(found / "state.json")["global_step"]}
    if (folder / DONE).exists() and files.read_json(folder / DONE) == asked:
        print(f"{folder}: evaluated already")
    else:
        _evaluate(cfg, folder, found)
        files.write_json(folder / DONE, asked)
    print(scores.table(scores.read_results(folder / "results.json")))
    print(f"report: {folder / 'report.html'}")


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
    targets = TargetSet(Path(cfg.shards), cfg.target)
    utterances = Utterances(Path(cfg.shards), cfg.splits)
    tasks, prompts = manifest.read_instructions(Path(cfg.instructions)), read_prompts(Path(cfg.prompts))
    questions = questions_about(utterances, tasks, prompts, cfg.prompt_group, cfg.seed)
    llm = FrozenLlm(cfg.llm)
    mapper = SpeechMapper.from_pretrained(found)
    if mapper.output_width != llm.embeddings.weight.shape[1]:
        raise UserError(
            f"mapper {found} maps into {mapper.output_width} dimensions, but LLM {cfg.llm.path} has "
            f"{llm.embeddings.weight.shape[1]}; name the LLM that its targets came from"
        )
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
