"""What a SLURM cluster has: its partitions' nodes, CPUs, GPUs and time limits, as sinfo tells them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sm_train.errors import UserError

FORMAT = "%P|%l|%s|%N|%c|%G|%t"
"""sinfo's fields: partition, time limit, nodes of a job, node, CPUs, GRES, state; one line a node and partition."""
UNLIMITED = float("inf")


@dataclass(frozen=True)
class Node:
    """One node as a partition offers it."""

    partition: str
    is_default: bool
    limit: str
    """Of a job's time, in SLURM's form."""
    most_nodes: float
    """That one job may have."""
    name: str
    cpus: int
    gpus: int
    is_up: bool = True
    """Neither down nor drained."""


def read(said: str) -> list[Node]:
    """The nodes that ``sinfo --noheader --Node --format=FORMAT`` lists."""
    nodes = []
    for line in said.splitlines():
        partition, limit, size, name, cpus, gres, state = line.strip().split("|")
        most = size.partition("-")[2] or size
        # gpu:a100:4(S:0-1),nvme:1
        gpus = sum(int(n) for n in re.findall(r"(?:^|,)gpu(?::[^:,(]+)?:(\d+)", gres))
        most_nodes = float(most) if most.isdigit() else UNLIMITED
        cores = int(cpus.rstrip("+"))
        is_up = not re.match("down|drain|drng|fail|maint|unk|boot|pow|comp", state) and "*" not in state
        nodes.append(Node(partition.rstrip("*"), partition.endswith("*"), limit, most_nodes, name, cores, gpus, is_up))
    return nodes


def seconds(time: str) -> float:
    """A time in one of SLURM's forms: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S, or UNLIMITED.

    Raises:
        ValueError: it is none of them.
    """
    if time.lower() in ("unlimited", "infinite"):
        return UNLIMITED
    if not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", time):
        raise ValueError(f"slurm.time is {time!r}; it must be as 30 (minutes), 8:00:00 or 1-12:00:00")
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:
        parts.insert(0, 0)  # minutes come first
    hours, minutes, secs = [*parts, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + secs


def check(found: list[Node], partition: str, nodes: int, cpus: int, gpus: int, time: str) -> None:
    """Refuse what a partition could never run.

    Args:
        partition: its name, or several with commas between them; the default one if empty.
        nodes, cpus, gpus: how many nodes, with how much on each.
        time: the limit asked for, in SLURM's form; empty for the partition's.

    Raises:
        UserError: there is no such partition, or it has less.
    """
    first, _, others = partition.partition(",")
    if others:  # SLURM takes the one that can begin first
        try:
            return check(found, first, nodes, cpus, gpus, time)
        except UserError:
            return check(found, others, nodes, cpus, gpus, time)
    names = sorted({node.partition for node in found})
    own = [node for node in found if (node.partition == partition if partition else node.is_default)]
    if not own:
        what = (
            f"slurm.partition is {partition!r}" if partition else "slurm.partition is not set, and none is the default"
        )
        raise UserError(f"{what}; this cluster has {', '.join(names) or 'none'}")
    name, limit, most = own[0].partition, own[0].limit, own[0].most_nodes
    if nodes > min(len(own), most):
        raise UserError(f"nodes is {nodes}; a job in partition {name} gets at most {min(len(own), most):g}")
    fitting = [node for node in own if node.cpus >= cpus and node.gpus >= gpus]
    if nodes > len(fitting):
        largest = max(own, key=lambda node: (node.gpus >= gpus, node.cpus))
        raise UserError(
            f"{cpus} CPUs and {gpus} GPUs on each of {nodes} nodes: partition {name} has {len(fitting)} such nodes; "
            f"its largest has {largest.cpus} CPUs and {largest.gpus} GPUs"
        )
    if time and seconds(time) > seconds(limit):
        raise UserError(f"slurm.time is {time}; partition {name} allows at most {limit}")
