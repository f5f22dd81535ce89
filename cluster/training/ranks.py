"""The ranks of one node: child processes with torchrun's variables, each with a log of its own.

python -m cluster.training.ranks PARENT COMMAND ...    become COMMAND, which ends when process PARENT does
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import cluster
from cluster.stages import PORTS
from sm_train.data.processes import die_with
from sm_train.errors import LOST, MISTAKEN, STOPPED

_TAIL_BYTES = 4000


@dataclass(frozen=True)
class Place:
    """One node's place among those of a run."""

    node: int
    nodes: int
    ranks_per_node: int
    address: str
    """Of the node of rank 0."""
    port: int
    """A free one there."""

    @property
    def ranks(self) -> range:
        """This node's."""
        return range(self.node * self.ranks_per_node, (self.node + 1) * self.ranks_per_node)

    def env(self, rank: int) -> dict[str, str]:
        """The variables that tell a rank of this node who it is."""
        values = {
            "RANK": rank, "LOCAL_RANK": rank - self.ranks[0], "WORLD_SIZE": self.nodes * self.ranks_per_node,
            "LOCAL_WORLD_SIZE": self.ranks_per_node, "MASTER_ADDR": self.address, "MASTER_PORT": self.port,
        }  # fmt: skip
        return {name: str(value) for name, value in values.items()}


class Ranks:
    """The processes of one node's ranks. They end with this process, whatever ends it (Linux).

    Args:
        command: what each runs.
        logs: a folder; what rank R prints is appended to ``rank-R.log`` there.
        home: the folder that they run in.
        env: variables beside this process's own and the rank's.
    """

    def __init__(self, command: list[str], place: Place, logs: Path, home: Path, env: dict[str, str]) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = {rank: logs / f"rank-{rank}.log" for rank in place.ranks}
        self._began = {rank: log.stat().st_size if log.exists() else 0 for rank, log in self._logs.items()}
        self._read = dict(self._began)
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        become = [sys.executable, "-m", "cluster.training.ranks", str(os.getpid()), *command]
        for rank, log in self._logs.items():
            variables = {**os.environ, **env, **code_first(), **place.env(rank)}
            with log.open("ab") as out:
                self._processes[rank] = subprocess.Popen(
                    become, cwd=home, env=variables, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
                )

    def codes(self) -> dict[int, int]:
        """The exit codes of those that have ended, by rank; -N for death by signal N."""
        polled = {rank: process.poll() for rank, process in self._processes.items()}
        return {rank: code for rank, code in polled.items() if code is not None}

    def signal(self, number: int) -> None:
        """Send a signal to those that live."""
        for process in self._processes.values():
            process.send_signal(number)

    def end(self, grace_s: float) -> None:
        """Ask those that live to leave, and kill those that have not within ``grace_s``."""
        self.signal(signal.SIGTERM)
        end = time.monotonic() + grace_s
        for process in self._processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
        self.signal(signal.SIGKILL)
        for process in self._processes.values():
            process.wait()

    def output(self, rank: int) -> bytes:
        """What a rank has printed since this was last asked."""
        with self._logs[rank].open("rb") as log:
            log.seek(self._read[rank])
            found = log.read()
        self._read[rank] += len(found)
        return found

    def last_words(self, rank: int) -> str:
        """The end of what a rank has printed, in whole lines."""
        with self._logs[rank].open("rb") as log:
            start = max(self._began[rank], self._logs[rank].stat().st_size - _TAIL_BYTES)
            log.seek(start)
            found = log.read().decode(errors="replace")
        return found if start == self._began[rank] else found.partition("\n")[2]


def code_first() -> dict[str, str]:
    """Variables by which a child imports the code that this process runs, whatever folder it runs in."""
    here = str(Path(str(cluster.__file__)).parents[1])
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", here)]
    return {"PYTHONPATH": os.pathsep.join([here, *others]), "PYTHONSAFEPATH": "1"}


def final(codes: dict[int, int]) -> int | None:
    """The code that ranks' codes end a run with for good; None if they do not: the same command would go on.

    A mistake or a bug of one rank is what all others have left for; a stop is one for all.
    """
    for code in (MISTAKEN, *sorted({*codes.values()} - {0, LOST, STOPPED, MISTAKEN}), STOPPED):
        if code > 0 and code in codes.values():
            return code
    return None


def how(code: int) -> str:
    """An exit code in words."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return "left, as another rank was lost" if code == LOST else f"ended with code {code}"


def free_port() -> int:
    """A port of this node that nobody listens on."""
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError(f"no free port among 100 of {PORTS.start} to {PORTS.stop}")


if __name__ == "__main__":
    die_with(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
