"""Submit a stage: the same config on this machine, on a Ray cluster, or under SLURM.

    python -m cluster.submit STAGE CONFIG to=local|ray|slurm nodes=N ranks_per_node=M gpus_per_node=K key=value ...

STAGE is precompute, retarget, pretrain, tune or evaluate; what is no key of the submission goes to the stage. With
dry_run=true what would be sent is printed. What config, inputs and scheduler show to fail is refused before.
"""

from __future__ import annotations

import dataclasses
import sys

from cluster import preflight, submission
from cluster.places import local, ray, slurm
from cluster.submission import SCHEMAS, Job, SubmitConfig
from sm_train import config
from sm_train.errors import UserError, run_command

USAGE = "usage: python -m cluster.submit STAGE CONFIG to=local|ray|slurm [key=value ...]"


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """The submission's own words, and the stage's."""
    names = {field.name for field in dataclasses.fields(SubmitConfig)}
    own = [word for word in words if "=" in word and word.partition("=")[0].partition(".")[0] in names]
    return own, [word for word in words if word not in own]


def read(argv: list[str]) -> Job:
    """The job that a command line asks for."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{USAGE}\n\nSTAGE: {', '.join(SCHEMAS)}\n\nkeys of the submission:\n{config.describe(SubmitConfig)}")
        print("\nkeys of a stage: python -m cluster.submit STAGE --help")
        raise SystemExit(0)
    if argv[0] not in SCHEMAS:
        raise UserError(f"stage is {argv[0]!r}; it must be one of {', '.join(SCHEMAS)}; {USAGE}")
    own, stages = split(argv[1:])
    return submission.make(argv[0], stages, config.from_words(SubmitConfig, own, "cluster.submit"))


def main(argv: list[str]) -> None:
    job = read(argv)
    preflight.check(job)
    place = {"local": local, "ray": ray, "slurm": slurm}[job.submit.to]
    place.check(job)
    if job.submit.dry_run:
        print(place.script(job), end="")
        return
    submission.write(job)
    print(f"{job.name}: {job.folder}", file=sys.stderr, flush=True)
    place.send(job)


if __name__ == "__main__":
    run_command(main)
