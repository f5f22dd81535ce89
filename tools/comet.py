"""COMET of the translations in hypotheses.jsonl, by a Python that has it: never a dependency of this project.

    python -m venv comet-env && comet-env/bin/pip install unbabel-comet "setuptools<81"
    python -m tools.comet HYPOTHESES.jsonl --python comet-env/bin/python --model Unbabel/wmt22-comet-da

COMET's own requirements (transformers below 5, numpy below 2) exclude ours, so it runs in a process of its environment:
segments go there as JSON, scores come back as JSON. A segment's source is the transcript: the reference of the asr task
in the same file. Writes comet.json beside the hypotheses, in the form of results.json: the mean segment score times
100, as papers print it, with a 95% bootstrap interval over utterances.

COMET's checkpoints are pickles, which can run code as they are read: name only models that you trust.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sm_train.errors import UserError, run_command
from sm_train.scoring import scores
from sm_train.scoring.scores import Hypothesis, Result

INSTALL = 'python -m venv comet-env && comet-env/bin/pip install unbabel-comet "setuptools<81"'
REMEDY = f"make it: {INSTALL}, then --python comet-env/bin/python"
MODEL = "Unbabel/wmt22-comet-da"


@dataclass(frozen=True, slots=True)
class Scored:
    """What came back from COMET's environment."""

    scores: list[float]
    """One for each segment, in their order."""
    version: str
    hash: str
    """Of the checkpoint's file."""


def segments(hypotheses: Sequence[Hypothesis]) -> list[dict[str, str]]:
    """Source, translation and reference of each translation, by COMET's names.

    Raises:
        UserError: an utterance has no transcript among the hypotheses.
    """
    transcripts = {(item.split, item.id): item.reference for item in hypotheses if item.task == "asr"}
    found = []
    for item in hypotheses:
        if item.task != "st":
            continue
        if (item.split, item.id) not in transcripts:
            raise UserError(
                f"{item.id}: its transcript, COMET's source, is not among the hypotheses; evaluate the asr task too"
            )
        source = transcripts[item.split, item.id]
        found.append({"src": source, "mt": item.hypothesis, "ref": item.reference})
    return found


def ask_comet(asked: Sequence[dict[str, str]], python: str, model: str, batch_size: int, gpus: int) -> Scored:
    """Scores by COMET in another environment; equal segments are scored once.

    Raises:
        UserError: that Python is not there or has no COMET, or COMET fails.
    """
    unlike = list({tuple(segment.values()): segment for segment in asked}.values())
    job = {"model": model, "segments": unlike, "batch_size": batch_size, "gpus": gpus}
    script = Path(__file__).with_name("comet_scores.py").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as aside:
        ask, told = Path(aside, "segments.json"), Path(aside, "scores.json")
        ask.write_text(json.dumps(job), encoding="utf-8")
        try:
            code = subprocess.run(
                [python, "-c", script, str(ask), str(told)], stdout=sys.stderr, check=False
            ).returncode
        except OSError as error:
            raise UserError(f"--python {python} cannot be run ({error.strerror}); {REMEDY}") from None
        if not told.exists():
            raise UserError(f"COMET under {python} ended with code {code}; what it said stands above")
        found: dict[str, Any] = json.loads(told.read_text(encoding="utf-8"))
    if found.get("error") == "ModuleNotFoundError" and "'comet'" in found["reason"]:
        raise UserError(f"--python {python} has no COMET; {REMEDY}")
    if "error" in found:
        raise UserError(f"COMET {model} failed under {python}: {found['error']}: {found['reason']}")
    by_segment = dict(zip((tuple(segment.values()) for segment in unlike), found["scores"], strict=True))
    return Scored([by_segment[tuple(segment.values())] for segment in asked], found["version"], found["hash"])


def results(hypotheses: Sequence[Hypothesis], scored: Scored, model: str) -> list[Result]:
    """The mean x 100 of each (system, language, split, group of prompts), with its interval."""
    groups: dict[tuple[str, str, str, str], list[int]] = defaultdict(list)
    told = [item for item in hypotheses if item.task == "st"]
    for number, item in enumerate(told):
        groups[item.system, f"st-{item.target_lang}", item.split, item.group].append(number)
    signature = f"COMET|{model}|hash:{scored.hash}|unbabel-comet:{scored.version}"
    signature += f"|bootstrap:{scores.RESAMPLES}|seed:{scores.SEED}"
    found = []
    for (system, task, split, prompts), numbers in groups.items():
        stats = np.array([[100 * scored.scores[i], 1.0] for i in numbers])
        rows = scores.utterance_rows([told[i].id for i in numbers])
        interval = scores.with_interval(stats, rows, scores.share)
        found.append(Result(system, task, "COMET", *interval, len(numbers), split, signature, prompts))
    return found


def main(argv: list[str]) -> None:
    assert __doc__
    parser = ArgumentParser("python -m tools.comet", description=__doc__.splitlines()[0])
    parser.add_argument("hypotheses", type=Path, metavar="HYPOTHESES.jsonl")
    parser.add_argument("--python", required=True, help="the interpreter of an environment with unbabel-comet")
    parser.add_argument("--model", default=MODEL, help=f"folder, checkpoint or hub repository (default {MODEL})")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--gpus", type=int, default=0, choices=(0, 1))
    asked = parser.parse_args(argv)
    hypotheses = scores.read_hypotheses(asked.hypotheses)
    triples = segments(hypotheses)
    if not triples:
        raise UserError(f"{asked.hypotheses} holds no translation (task st); there is nothing for COMET to score")
    scored = ask_comet(triples, asked.python, asked.model, asked.batch_size, asked.gpus)
    found = results(hypotheses, scored, asked.model)
    out = asked.hypotheses.with_name("comet.json")
    scores.write_results(out, found)
    for r in found:
        print(f"{r.system}, {r.split}, {r.prompts}: {r.task} COMET {r.value:.2f} [{r.low:.2f}, {r.high:.2f}]")
    print(out)


if __name__ == "__main__":
    run_command(main)
