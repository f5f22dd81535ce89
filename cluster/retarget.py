"""Give a complete shard set the targets of another LLM, and a target set its tasks. Features are left as they are.

    python -m cluster.retarget SHARD_SET --llm FOLDER_OR_REPO --name NAME [--instructions FILE ...]
    python -m cluster.retarget SHARD_SET --instructions FILE [FILE ...] [--name NAME]

Of the LLM only its embedding tensor, its tokenizer and its chat template are read. A target set that is there with the
same contract is left alone, or extended to the utterances that its shard set has gained.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from sm_train.data import owner, remote_sets, shards, store
from sm_train.data.store import Store
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
    place = store.at(asked.shard_set)
    if not shards.is_complete(place):
        raise UserError(f"shard set {place.uri} does not exist, or is not complete")
    llm = _target_config(asked) if asked.llm else None
    name = llm.name if llm else asked.name or _only_target_set(place)
    with owner.hold(place) as held:
        if llm:
            said = remote_sets.with_local_copy(held, name, partial(targets.make, llm))
            print(f"{place.uri}/targets/{name}: {said}", flush=True)
        if files := asked.instructions:
            said = remote_sets.with_local_copy(held, name, lambda folder: tasks.build(folder, name, files))
            print(f"{place.uri}/targets/{name}: {said}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m cluster.retarget", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("shard_set", help="a complete shard set: a folder, or its address")
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


def _only_target_set(place: Store) -> str:
    names = [name for name in place.names("targets") if place.exists(f"targets/{name}/{shards.DATASET}")]
    if not names:
        raise UserError(f"shard set {place.uri} has no target set; give its LLM with --llm and a name with --name")
    if len(names) > 1:
        raise UserError(f"shard set {place.uri} has {len(names)} target sets ({', '.join(names)}); choose with --name")
    return names[0]


if __name__ == "__main__":
    run_command(main)
