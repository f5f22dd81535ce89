"""Whether a SLURM job that has left goes back into the queue; the templates of cluster/slurm ask at their end.

    python -m cluster.again STATUS STAGE CONFIG.yaml [key=value ...]      # exit code 0: yes

STATUS is srun's: the highest exit code of a task. A mistake or a bug that ends all ranks never starts again. What a
signal or the loss of a rank has ended does, SM_MAX_REQUEUES times (3) without progress: for training, a new checkpoint.
One rank's mistake before the ranks have met, or its bug, is a lost rank to the others, and counts as such.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from cluster.stages import TRAINING
from sm_train import config, files
from sm_train.errors import LOST, STOPPED, UserError, run_command

NOT_AGAIN = 3
"""This command's exit code for no."""
REQUEUES = "requeues.json"
MAX_REQUEUES = 3


def verdict(status: int, times: int, limit: int) -> str | None:
    """Why a job does not start again; None if it does.

    Args:
        status: 75 saved after a signal, 76 another rank lost, above 128 ended by a signal.
        times: how often it has started again already without progress.
    """
    if status not in (STOPPED, LOST) and status <= 128:
        return f"exit code {status} is not mended by another start"
    if times >= limit:
        return f"exit code {status}, and {times} starts again brought no progress (SM_MAX_REQUEUES={limit})"
    return None


def times_without_progress(stage: str, argv: list[str], env: Mapping[str, str]) -> int:
    """How often this job has started again since its last progress; remembered in the run folder for training.

    Raises:
        UserError: the config is missing, or names no run folder.
    """
    restarts = int(env.get("SLURM_RESTART_COUNT") or 0)
    if stage not in TRAINING:
        return restarts
    run = run_folder(argv)
    latest = run / "checkpoints/latest"
    step = os.readlink(latest) if latest.is_symlink() else "no checkpoint"
    path = run / REQUEUES
    before = files.read_json(path) if path.exists() else {}
    is_same = (before.get("job"), before.get("checkpoint")) == (env.get("SLURM_JOB_ID"), step)
    times = int(before["times"]) + 1 if is_same else 0
    run.mkdir(parents=True, exist_ok=True)
    files.write_json(path, {"job": env.get("SLURM_JOB_ID"), "checkpoint": step, "times": times})
    return times


def _limit(env: Mapping[str, str]) -> int:
    given = env.get("SM_MAX_REQUEUES") or str(MAX_REQUEUES)
    if not given.isdigit():
        raise UserError(f"SM_MAX_REQUEUES is {given!r}; it must be a number of starts, as {MAX_REQUEUES}")
    return int(given)


def run_folder(argv: list[str]) -> Path:
    """The run folder that a stage's command line names, read without its schema: that would cost seconds."""
    if not argv:
        raise UserError("no config file given; usage: python -m cluster.again STATUS STAGE CONFIG.yaml [key=value ...]")
    words = [word.removeprefix("run=") for word in argv[1:] if word.startswith("run=")]
    run = words[-1] if words else config.read_yaml(Path(argv[0])).get("run")
    if not run:
        raise UserError(f"{argv[0]} names no run folder; give run=FOLDER")
    return Path(str(run)).expanduser()


def main(argv: list[str]) -> None:
    if len(argv) < 2 or not argv[0].isdigit():
        raise UserError("usage: python -m cluster.again STATUS STAGE CONFIG.yaml [key=value ...]")
    if argv[0] == "0":
        sys.exit(NOT_AGAIN)
    status, limit = int(argv[0]), _limit(os.environ)
    may_start = verdict(status, 0, limit) is None
    times = times_without_progress(argv[1], argv[2:], os.environ) if may_start else 0
    if why := verdict(status, times, limit):
        print(f"not queued again: {why}", flush=True)
        sys.exit(NOT_AGAIN)
    early = status == 128 + signal.SIGUSR1
    hint = "; it was signalled before it trained: is --signal too long before the end of --time?" if early else ""
    print(f"queued again: exit code {status}; {times} starts without progress before{hint}", flush=True)


if __name__ == "__main__":
    run_command(main)
