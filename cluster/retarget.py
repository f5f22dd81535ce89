"""Give a complete shard set the targets of another LLM, and a target set its tasks. Features are left as they are.

    python -m cluster.retarget SHARD_SET --llm FOLDER_OR_REPO --name NAME [--instructions FILE ...]
    python -m cluster.retarget SHARD_SET --instructions FILE [FILE ...] [--name NAME]

Of the LLM only its embedding tensor, its tokenizer and its chat template are read. A target set that is there with the
same contract is left alone, or extended to the utterances that its shard set has gained.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sm_train.data.shards import DATASET
from sm_train.errors import UserError, run_command
from sm_train.models import targets, tasks
from sm_train.models.target_parts import STORES

_OF_LLM = ("revision", "pad_token", "normaliser", "store")


def main(argv: list[str]) -> None:
    asked = _parser().parse_args(argv)
    if not asked.llm and not asked.instructions:
        raise UserError("nothing to do: give --llm for targets of an LLM, --instructions for tasks, or both")
    for name in _OF_LLM:
        if not asked.llm and getattr(asked, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} says how targets are made; give their LLM with --llm")
    _require_set(asked.shard_set)
    if asked.llm:
        print(targets.make(_target_config(asked), asked.shard_set), flush=True)
    if asked.instructions:
        name = asked.name or _only_target_set(asked.shard_set)
        print(tasks.build(asked.shard_set, name, asked.instructions), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m cluster.retarget", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("shard_set", type=Path, help="folder of a complete shard set")
    parser.add_argument("--name", help="the target set: a new name with --llm; else may be left out where there is one")
    parser.add_argument("--llm", help="folder or hub repository of an LLM; without it only tasks are written")
    parser.add_argument("--revision", help="hub revision to pin")
    parser.add_argument("--pad-token", help="the token that fills the positions after a text; the tokenizer's own")
    parser.add_argument("--normaliser", help="of the transcripts, before they are tokenised: mms (default) | none")
    parser.add_argument("--store", help=f"{' | '.join(STORES)}: with vectors samples hold their embedding rows too")
    parser.add_argument(
        "--instructions", type=Path, nargs="+", metavar="FILE",
        help="Parquet or JSONL files of tasks; they replace those there were",
    )  # fmt: skip
    return parser


def _target_config(asked: argparse.Namespace) -> targets.TargetConfig:
    if not asked.name:
        raise UserError(f"--llm {asked.llm}: name the target set with --name")
    given = {name: getattr(asked, name) for name in _OF_LLM if getattr(asked, name) is not None}
    try:
        return targets.TargetConfig(asked.name, asked.llm, **given)
    except ValueError as error:
        raise UserError(str(error)) from None


def _require_set(shard_set: Path) -> None:
    if not (shard_set / DATASET).exists():
        raise UserError(f"shard set {shard_set} does not exist, or is not complete")


def _only_target_set(shard_set: Path) -> str:
    names = sorted(path.parent.name for path in (shard_set / "targets").glob(f"*/{DATASET}"))
    if not names:
        raise UserError(f"shard set {shard_set} has no target set; give its LLM with --llm and a name with --name")
    if len(names) > 1:
        raise UserError(f"shard set {shard_set} has {len(names)} target sets ({', '.join(names)}); choose with --name")
    return names[0]


if __name__ == "__main__":
    run_command(main)
