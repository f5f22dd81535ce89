"""What ``srun`` starts once a rank: SLURM's variables become those of a rank, and the stage takes this process's place.

    srun python -m cluster.launch STAGE CONFIG.yaml [key=value ...]

A MASTER_ADDR or MASTER_PORT that is set already is kept.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress

from cluster.stages import PORTS, TRAINING
from sm_train.errors import UserError, run_command


def rank_variables(env: Mapping[str, str], address: Callable[[str], str]) -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of the task that ``env`` is of.

    Every task of a step gets the same address and port, without a word between them; a job that was requeued gets
    another port, as what is left of its last start may still hold the old one.

    Args:
        env: the environment that srun gives a task.
        address: of a node, by its name.

    Raises:
        UserError: SLURM's variables are not there.
    """
    rank, local_rank, world_size, node = (
        _need(env, name) for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NODEID")
    )
    nodes = env.get("SLURM_STEP_NODELIST") or _need(env, "SLURM_JOB_NODELIST")
    tasks = tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE") or _need(env, "SLURM_TASKS_PER_NODE"))
    start = [env.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")]
    return {
        "RANK": rank,
        "LOCAL_RANK": local_rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": str(tasks[int(node)]),
        "MASTER_ADDR": env.get("MASTER_ADDR") or address(first_node(nodes)),
        "MASTER_PORT": env.get("MASTER_PORT") or str(PORTS[zlib.crc32(".".join(start).encode()) % len(PORTS)]),
    }


def _need(env: Mapping[str, str], name: str) -> str:
    if not (value := env.get(name)):
        how = "srun starts this command, in a job: sbatch cluster/slurm/train.sbatch STAGE CONFIG"
        raise UserError(f"{name} is not set; {how}; without SLURM: torchrun -m sm_train.STAGE CONFIG")
    return value


def tasks_per_node(text: str) -> list[int]:
    """SLURM's run lengths as one number a node: ``2(x3),1`` is [2, 2, 2, 1]."""
    runs = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", run) for run in text.split(",")]
    return [int(run[1]) for run in runs if run for _ in range(int(run[2] or 1))]


def first_node(nodes: str) -> str:
    """The first name of a list of SLURM's: ``gpu[007-009,12]-ib,login`` is gpu007-ib."""
    found = re.match(r"(?:\[[^\]]*\]|[^,\[])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", found[0]) if found else nodes


def address_of(node: str) -> str:
    """A node's name where it resolves, else the address that SLURM knows it by."""
    with suppress(OSError):
        socket.getaddrinfo(node, None)
        return node
    with suppress(OSError):
        command = ["scontrol", "show", "node", node, "--oneliner"]
        said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout
        if found := re.search(r" NodeAddr=(\S+)", said):
            return found[1]
    raise UserError(f"node {node} has no address: its name does not resolve and scontrol knows none; set MASTER_ADDR")


def main(argv: list[str]) -> None:
    if not argv or argv[0] not in TRAINING:
        given = f"not {argv[0]!r}" if argv else "and none was given"
        raise UserError(f"stage is {' or '.join(TRAINING)}, {given}; usage: python -m cluster.launch STAGE CONFIG.yaml")
    os.environ.update(rank_variables(os.environ, address_of))
    os.execv(sys.executable, [sys.executable, "-m", f"sm_train.{argv[0]}", *argv[1:]])


if __name__ == "__main__":
    run_command(main)
