"""Give a target set its tasks: instructions on the set's utterances, answers in the LLM's token ids.

    python -m cluster.retarget SHARD_SET --instructions FILE [FILE ...] [--name NAME]

Features and targets are left as they are; the LLM's tokenizer and chat template are read, none of its weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sm_train.data.shards import DATASET
from sm_train.errors import UserError, run_command
from sm_train.models import tasks


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m cluster.retarget", description=__doc__.splitlines()[0])
    parser.add_argument("shard_set", type=Path, help="folder of a complete shard set")
    parser.add_argument(
        "--instructions",
        type=Path,
        nargs="+",
        required=True,
        help="Parquet or JSONL files of tasks; they replace those there were",
    )
    parser.add_argument("--name", help="target set to give them to; may be left out where there is but one")
    asked = parser.parse_args(argv)
    print(tasks.build(asked.shard_set, asked.name or _only_target_set(asked.shard_set), asked.instructions), flush=True)


def _only_target_set(shard_set: Path) -> str:
    if not (shard_set / DATASET).exists():
        raise UserError(f"shard set {shard_set} does not exist, or is not complete")
    names = sorted(path.parent.name for path in (shard_set / "targets").glob(f"*/{DATASET}"))
    if not names:
        raise UserError(f"shard set {shard_set} has no target set; name its LLM under targets in the precompute config")
    if len(names) > 1:
        raise UserError(f"shard set {shard_set} has {len(names)} target sets ({', '.join(names)}); choose with --name")
    return names[0]


if __name__ == "__main__":
    run_command(main)
