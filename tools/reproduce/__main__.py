"""Train, evaluate and compare every row of a world; what is done is not done again.

    python -m tools.reproduce --world miniature-hard [--seeds 0 1 2] [--rows stage1 ...] [--jobs 2] [key=value ...]
    python -m tools.reproduce --world miniature-hard --dry-run
    python -m tools.reproduce --world miniature-hard --table --to docs/results

A world is a YAML file in configs/reproduce, or the path of one; key=value overrides what it says. Everything is made in
runs/reproduce/WORLD: table.md, table.json, claims.md and pictures at its top. Ctrl-C ends what is at work; the same
command goes on.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from sm_train import config
from sm_train.errors import UserError, run_command
from sm_train.runlog import clock
from tools.reproduce import publish, results, world
from tools.reproduce.graph import Item, items_of
from tools.reproduce.runner import Book, run_items, tail
from tools.reproduce.world import ClaimConfig, RowConfig, WorldConfig

T = TypeVar("T")


def main(argv: list[str]) -> None:
    words = [word for word in argv if "=" in word and not word.startswith("-")]
    asked = _parser().parse_args([word for word in argv if word not in words])
    chosen = world.read(asked.world, words)
    root = world.folder_of(asked.world, chosen)
    rows = _chosen(asked.rows, list(chosen.rows), "row")
    seeds = _chosen(asked.seeds, sorted({s for row in chosen.rows for s in chosen.seeds_of(row)}), "seed")
    items = items_of(chosen, root, rows, seeds)
    if asked.dry_run:
        return _show(items, root, asked.jobs)
    failed = [] if asked.table else run_items(items, root, asked.jobs)
    said = ["python", "-m", "tools.reproduce", *(word for word in argv if word != "--table")]
    for path in publish.write(results.read(chosen, root), root, Path(asked.world).stem, shlex.join(said), asked.to):
        print(path)
    for one in failed:
        print(f"\n{one.name}: {one.why} ({one.log})\n{tail(one.log) if one.log.is_file() else ''}".rstrip())
    if failed:
        raise UserError(f"{len(failed)} of {len(items)} items are not done; the same command tries them again")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m tools.reproduce", description=__doc__, epilog=_keys(), allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--world", required=True, help="a name in configs/reproduce, or a YAML file")
    parser.add_argument("--seeds", nargs="+", type=int, help="these alone; those of the world if not given")
    parser.add_argument("--rows", nargs="+", help="these alone, with what they build on; all if not given")
    parser.add_argument(
        "--jobs", type=_at_least_one, default=2, help="items at work beside each other, a thread each (2)"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the items, and whether they are done")
    parser.add_argument("--table", action="store_true", help="run nothing: make the table of what is there")
    parser.add_argument("--to", type=Path, help="folder to copy table, claims and pictures to, such as docs/results")
    return parser


def _keys() -> str:
    """What a world's file may say."""
    kinds = {"a world": WorldConfig, "rows.KEY": RowConfig, "each of claims": ClaimConfig}
    return "\n\n".join(f"keys of {name}:\n{config.describe(kind)}" for name, kind in kinds.items()).replace("%", "%%")


def _at_least_one(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)


def _chosen(asked: Sequence[T] | None, known: list[T], what: str) -> list[T]:
    if unknown := [one for one in asked or () if one not in known]:
        raise UserError(f"{what} {unknown[0]} is not in this world; it has {', '.join(map(str, known))}")
    return [one for one in known if asked is None or one in asked]


def _show(items: Sequence[Item], root: Path, jobs: int) -> None:
    book = Book(root, items)
    left_s, unknown = 0.0, 0
    for item in items:
        seconds = book.expected_s(item)
        is_done = book.is_done(item)
        left_s += 0.0 if is_done else seconds or 0.0
        unknown += seconds is None and not is_done
        about = "done" if is_done else "" if seconds is None else f"about {clock(seconds)}"
        print(f"{item.name:32} {about:16} {' '.join(item.needs)}\n    python -m {shlex.join(item.command)}")
    num_done = sum(map(book.is_done, items))
    beyond = f", {unknown} items of unknown length beside" if unknown else ""
    about = f"about {clock(left_s / jobs)} with {jobs} jobs{beyond}" if left_s or not unknown else "unknown yet"
    print(f"{len(items)} items, {num_done} done; left: {about}")


if __name__ == "__main__":
    run_command(main)
