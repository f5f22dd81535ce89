"""Results and report again, from hypotheses alone: no model is asked.

    python -m sm_train.report --from-hyps RUN/hypotheses.jsonl [--to FOLDER] [--lexicon FILE] [--normaliser mms]

results.json gets the bytes that the evaluation wrote: how it scored stands in evaluation.json beside the hypotheses.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sm_train import config, evaluate, files
from sm_train.data.mds import file_digest
from sm_train.data.target_set import TargetSet
from sm_train.data.text import NORMALISERS, normalise
from sm_train.errors import UserError, printable, run_command
from sm_train.models.speech import device_here
from sm_train.prompts import LANGUAGES
from sm_train.scoring import scores, table
from sm_train.scoring.answers import Utterances
from sm_train.scoring.language import open_languages
from sm_train.scoring.mappers import Trained
from sm_train.scoring.report import build_report
from sm_train.scoring.scores import Hypothesis
from sm_train.scoring.showcase import examples, rows_of
from sm_train.scoring.systems import Mapped

_EXAMPLES = 4
T = TypeVar("T")


def main(argv: list[str]) -> None:
    asked = _parser().parse_args(argv)
    source: Path = asked.from_hyps
    folder: Path = asked.to or source.parent
    hypotheses = scores.read_hypotheses(source)
    if not hypotheses:
        raise UserError(f"{source} holds no hypotheses")
    done = source.parent / evaluate.DONE
    then = files.read_object(done) if done.is_file() else {}
    settings = then.get("settings", {})
    lexicon = asked.lexicon or _lexicon(settings.get("lexicon"), then.get("lexicon"))
    asked_for = {item.target_lang for item in hypotheses if item.task == "st"}
    languages = open_languages(lexicon, asked_for, LANGUAGES)
    normaliser = asked.normaliser or settings.get("normaliser", "mms")
    normalise("", normaliser)  # an unknown one is refused before anything is written
    _require_own(source, folder, then, normaliser, lexicon)
    table.write(folder, hypotheses, normaliser, languages)
    table.show(folder)
    _write_report(folder, hypotheses, settings)
    print(f"report: {folder / 'report.html'}")


def _require_own(source: Path, folder: Path, then: dict[str, Any], normaliser: str, lexicon: str | None) -> None:
    """An evaluation's own results stay what it said: other texts, or other scores of them, go elsewhere.

    Raises:
        UserError: the folder holds another evaluation, or this one scored otherwise.
    """
    there = folder / table.HYPOTHESES
    if (folder / evaluate.DONE).exists() and not (there.exists() and source.samefile(there)):
        raise UserError(f"{folder} holds another evaluation; name another folder with --to")
    settings = then.get("settings", {})
    scored = (settings.get("normaliser"), settings.get("lexicon"))
    if (folder / evaluate.DONE).exists() and scored != (normaliser, lexicon):
        raise UserError(
            f"{folder} was scored with normaliser {scored[0]} and lexicon {scored[1]}; name a folder with --to"
        )


def _lexicon(path: str | None, digest: str | None) -> str | None:
    """The word lists that the evaluation read.

    Raises:
        UserError: they are not there, or have changed.
    """
    if (path or digest) and not (path and Path(path).is_file() and file_digest(Path(path)) == digest):
        raise UserError(f"lexicon {path or ''} is not there as the evaluation read it; name that file with --lexicon")
    return path


def _write_report(folder: Path, hypotheses: list[Hypothesis], settings: dict[str, Any]) -> None:
    """With players, picture and curves where what they are made of is still there."""
    if not settings:
        build_report(folder, examples(rows_of(hypotheses), hypotheses, None, _EXAMPLES), None)
        return
    cfg = config.from_mapping(evaluate.EvaluateConfig, settings, evaluate.DONE)
    trained = _if_there(lambda: evaluate.read_trained(cfg)) or []
    utterances = _if_there(lambda: Utterances(Path(cfg.shards), cfg.splits))
    mapped = _if_there(lambda: _heard(cfg, trained[0])) if utterances and trained else None
    evaluate.write_report(cfg, folder, hypotheses, trained, utterances, mapped)


def _heard(cfg: evaluate.EvaluateConfig, one: Trained) -> Mapped:
    return one.as_system(TargetSet(Path(cfg.shards), cfg.target), cfg.trim, device_here("auto"))


def _if_there(read: Callable[[], T]) -> T | None:
    try:
        return read()
    except UserError as error:
        print(f"left out of the report: {printable(error)}", file=sys.stderr)
        return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m sm_train.report", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--from-hyps", type=Path, required=True, metavar="FILE", help="hypotheses.jsonl of evaluations")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="where the results go; the hypotheses' own folder")
    parser.add_argument("--lexicon", metavar="FILE", help="JSON file of words by language; the evaluation's, or none")
    parser.add_argument("--normaliser", help=f"{' | '.join(NORMALISERS)}; the evaluation's, or mms")
    return parser


if __name__ == "__main__":
    run_command(main)
