"""Check a machine, and what a stage's config names, before hours are spent on it.

    python -m cluster.doctor [STAGE CONFIG [nodes=N ranks_per_node=M gpus_per_node=K gpu=A100-80] key=value ...]
    torchrun --nproc-per-node 8 -m cluster.doctor STAGE CONFIG ...       (or srun: all-reduce across the real ranks)

STAGE is precompute, pretrain, tune or evaluate; the words are those of cluster.submit. A line a check: ok, warn, FAIL
or skip, and below what to do. It ends with 0 if nothing failed, with 1 if something did, with 2 for a mistaken config.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from cluster.doctor import allreduce, inputs, machine, sizes, software, trial
from cluster.doctor.findings import FAIL, WARN, Check, Finding, carry_out
from cluster.doctor.work import Work
from cluster.submission import SCHEMAS, SubmitConfig
from cluster.submit import split
from sm_train import config
from sm_train.errors import UserError, exit_hard, run_command

STAGES = tuple(name for name, schema in SCHEMAS.items() if schema)
_SPARE_S = 60.0
"""Beyond the limits of all checks, that ranks wait for each other at the end."""


def read(argv: list[str]) -> Work | None:
    """The stage that is asked about, if one is.

    Raises:
        UserError: no such stage, or its config is mistaken.
    """
    if not argv:
        return None
    if argv[0] not in STAGES:
        raise UserError(
            f"stage is {argv[0]!r}; it must be one of {', '.join(STAGES)}, or nothing for the machine alone"
        )
    own, words = split(argv[1:])
    submit = config.from_words(SubmitConfig, own, "cluster.doctor")
    world_size = allreduce.place()[1]
    if world_size > 1:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        submit = config.from_words(
            SubmitConfig, [*own, f"ranks_per_node={here}", f"nodes={world_size // here}"], "doctor"
        )
    return Work(argv[0], config.load(SCHEMAS[argv[0]], words, f"cluster.doctor {argv[0]}"), submit)


def checks(work: Work | None) -> list[Check]:
    """What one process can look at by itself, in the order of the report."""
    folder = (work.out_folder if work else None) or Path("runs")
    found = [*software.checks(), *machine.checks(folder)]
    if work:
        found += [*inputs.checks(work), *sizes.checks(work), *trial.checks(work)]
    return found


def look(work: Work | None) -> Iterator[Finding]:
    """Every finding of this process, as it comes; then what the ranks say together."""
    rank, world_size = allreduce.place()
    seen: list[Finding] = []
    group = None
    if world_size > 1:  # measured now, while no rank is busy with checks of its own
        if met := allreduce.meet():
            yield met
        else:
            measured, group = allreduce.across(_SPARE_S + sum(check.limit_s for check in checks(work)))
            yield measured
    # Of a node one rank looks; what a config names is the same for all of them.
    mine = checks(work) if rank == 0 else checks(None) if os.environ.get("LOCAL_RANK", "0") == "0" else []
    for check in mine:
        for finding in carry_out(check):
            seen.append(finding)
            yield finding
    if world_size == 1:
        yield from carry_out(Check(allreduce.NAME, allreduce.here, 50.0))
    elif group:
        yield from allreduce.gathered(seen, group)


def main(argv: list[str]) -> None:
    if any(word in ("-h", "--help") for word in argv):
        print(f"{(__doc__ or '').strip()}\n\nkeys of the submission:\n{config.describe(SubmitConfig)}")
        return
    begun, rank = time.monotonic(), allreduce.place()[0]
    work = read(argv)
    marks = []
    for finding in look(work):
        marks.append(finding.mark)
        if rank == 0:
            print(finding, flush=True)
    failed, warned = marks.count(FAIL), marks.count(WARN)
    if rank == 0:
        print(
            f"{len(marks)} lines in {time.monotonic() - begun:.0f} s: {failed} failed, {warned} to look at", flush=True
        )
    sys.stdout.flush()
    exit_hard(1 if failed else 0)  # a check that hangs must not hold the process


if __name__ == "__main__":
    run_command(main)
