"""An LLM judges the answers to questions in hypotheses.jsonl: yes or no to each, kept for good.

    python -m sm_train.judge HYPOTHESES.jsonl judge.path=MODEL instructions=FILE [key=value ...]

Writes judged.json beside the hypotheses, in the form of results.json; that file itself is left alone, as it must follow
from the hypotheses without any judge.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from sm_train import config
from sm_train.data import manifest
from sm_train.data.text import NORMALISERS
from sm_train.errors import UserError, run_command
from sm_train.models.llm import LlmConfig
from sm_train.runlog import clock, say
from sm_train.scoring import judge as judging
from sm_train.scoring import scores
from sm_train.scoring.judge import UNASKED, Judge, Verdicts
from sm_train.scoring.judged import claims_of, judged
from sm_train.scoring.scores import Result

SHOW_S = 10.0
USAGE = "usage: python -m sm_train.judge HYPOTHESES.jsonl judge.path=MODEL instructions=FILE [key=value ...]"


@dataclass(frozen=True)
class JudgeConfig:
    """Who judges, and what it is told."""

    judge: LlmConfig = config.key(LlmConfig(), "the LLM that judges")
    instructions: str = config.key(config.REQUIRED, "Parquet or JSONL file of tasks: it has the questions")
    prompt: str | None = config.key(None, "text file with {question} {reference} {answer} {context}; null: our own")
    cache: str | None = config.key(None, "JSONL file of verdicts, may be shared; null: verdicts.jsonl beside them")
    out: str | None = config.key(None, "JSON file of results; null: judged.json beside the hypotheses")
    trust_exact: bool = config.key(False, "an answer that is the reference, normalised, is right without being asked")
    normaliser: str = config.key("mms", "of trust_exact and of the rule that the judge is compared with: mms | none")
    batch_size: int = config.key(16, "prompts in one batch")
    threads: int = config.key(2, "CPU threads")

    def __post_init__(self) -> None:
        if self.normaliser not in NORMALISERS:
            raise ValueError(f"normaliser is {self.normaliser!r}; it must be one of {', '.join(NORMALISERS)}")
        for name in ("batch_size", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def run(path: Path, cfg: JudgeConfig) -> list[Result]:
    """Judge every answer to a question in a file of hypotheses, and write the results.

    Raises:
        UserError: a file or the judge cannot be read, or a question is not in the instructions.
    """
    torch.set_num_threads(cfg.threads)
    hypotheses = [item for item in scores.read_hypotheses(path) if item.task == "sqa"]
    if not hypotheses:
        raise UserError(f"{path} holds no answer to a question (task sqa); there is nothing to judge")
    judge = Judge(cfg.judge, _prompt(cfg.prompt))
    claims = claims_of(hypotheses, manifest.read_instructions(Path(cfg.instructions)), "{context}" in judge.prompt)
    kept = Verdicts(Path(cfg.cache) if cfg.cache else path.with_name("verdicts.jsonl"))
    if kept.damaged:
        say(f"{kept.path}: {kept.damaged} lines are no verdict; passed over")
    exact = [len(set(scores.normal_pair(item, cfg.normaliser))) == 1 for item in hypotheses]
    trusted = [cfg.trust_exact and same for same in exact]
    asked = [claim for claim, known in zip(claims, trusted, strict=True) if not known]
    start, had = time.monotonic(), len(kept.known)
    shown = start

    def show(done: int, total: int) -> None:
        nonlocal shown
        if done < total and time.monotonic() - shown < SHOW_S:
            return
        shown = time.monotonic()
        eta_s = (time.monotonic() - start) / done * (total - done)
        print(f"judge: {done} of {total} questions, ETA {clock(eta_s)}", file=sys.stderr, flush=True)

    told = iter(judging.judge_all(judge, asked, kept, cfg.batch_size, show))
    verdicts = [UNASKED if known else next(told) for known in trusted]
    facts = {name: judge.facts[name] for name in ("judge", "revision", "hash", "dtype", "prompt")}
    results = judged(hypotheses, verdicts, {**facts, "trust_exact": str(cfg.trust_exact)}, cfg.normaliser)
    masses = [verdict.mass for verdict in verdicts if verdict is not UNASKED]
    if masses and (mass := sum(masses) / len(masses)) < 0.5:
        say(f"warning: {cfg.judge.path} gives yes and no {mass:.2f} together: it would rather say something else")
    out = Path(cfg.out) if cfg.out else path.with_name("judged.json")
    scores.write_results(out, results)
    new = len(kept.known) - had
    say(f"{out}: {len(verdicts)} answers, {new} asked, {sum(trusted)} exact, the rest known from {kept.path}")
    return results


def _prompt(path: str | None) -> str:
    if path is None:
        return judging.PROMPT
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise UserError(f"prompt {path} cannot be read ({error}); name a text file") from None


def main(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        return print(f"{USAGE}\n\nkeys:\n{config.describe(JudgeConfig)}")
    if not argv or "=" in argv[0]:
        raise UserError(f"no file of hypotheses given; {USAGE}")
    for result in run(Path(argv[0]), config.from_words(JudgeConfig, argv[1:], "sm_train.judge")):
        value = f"{result.value:.3f} [{result.low:.3f}, {result.high:.3f}]"
        print(f"{result.system}, {result.split}, {result.prompts}: {result.metric} {value}, {result.count} answers")


if __name__ == "__main__":
    run_command(main)
