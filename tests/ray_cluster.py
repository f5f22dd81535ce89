"""A real Ray cluster on this machine in a process of its own: token authentication, a job server, nodes to be killed.

python -m tests.ray_cluster NODES CPUS    a head without CPUs and NODES beside it; ends with its standard input
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests.builders import ROOT, child_env
from tests.training import free_port

TOKEN = "a-token-of-the-tests"
STORE_BYTES = 80 << 20


class RayCluster:
    """The cluster's process, seen from a test.

    Args:
        folder: for its token, and for what it says.
        env: variables of all its processes.
    """

    def __init__(self, folder: Path, nodes: int, cpus: int, **env: str) -> None:
        (folder / "token").write_text(TOKEN)
        self.auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
        with (folder / "cluster.log").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.ray_cluster", str(nodes), str(cpus)], cwd=ROOT, text=True,
                env=child_env(**env, **self.auth, RAY_USAGE_STATS_ENABLED="0"), stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        assert self._process.stdin
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, (folder / "cluster.log").read_text()
        told: dict[str, Any] = json.loads(line)
        self.dashboard, self.address = str(told["dashboard"]), str(told["address"])
        self.raylets = [psutil.Process(pid) for pid in told["raylets"]]
        self._all = psutil.Process(self._process.pid)

    def kill_holder(self, words: str) -> list[psutil.Process]:
        """Kill a raylet below which some process has ``words`` on its command line; it, and all that were below it."""
        for raylet in self.raylets:
            found = below(raylet)
            if any(words in " ".join(one.cmdline()) for one in found):
                assert self._process.stdin
                print(raylet.pid, file=self._process.stdin, flush=True)
                self.raylets.remove(raylet)
                return [raylet, *found]
        raise AssertionError(f"no raylet has {words}")

    def close(self) -> list[str]:
        """End everything; the command lines of what had to be killed."""
        everything = below(self._all)
        assert self._process.stdin
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        _, left = psutil.wait_procs([self._all, *everything], timeout=5)
        for one in left:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        return [str(one) for one in left]


def is_alive(process: psutil.Process) -> bool:
    """Whether it has not ended; one whose code nobody has asked for has."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def below(process: psutil.Process) -> list[psutil.Process]:
    """A process's descendants."""
    with suppress(psutil.NoSuchProcess):
        return [one for one in process.children(recursive=True) if is_alive(one)]
    return []


def main(nodes: int, cpus: int) -> None:
    from ray.cluster_utils import Cluster

    # A raylet that was killed refuses the connection: only one that is merely slow is given the whole timeout.
    quick = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_timeout_ms": 5000,
             "health_check_failure_threshold": 3}  # fmt: skip
    port = free_port()
    head = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "_system_config": quick, "include_dashboard": True,
            "dashboard_host": "127.0.0.1", "dashboard_port": port}  # fmt: skip
    made = Cluster(initialize_head=True, head_node_args=head)
    beside = [made.add_node(wait=False, num_cpus=cpus, object_store_memory=STORE_BYTES) for _ in range(nodes)]
    made.wait_for_nodes()
    raylets = [one.all_processes["raylet"][0].process for one in beside]
    told = {"address": made.address, "dashboard": f"http://127.0.0.1:{port}", "raylets": [one.pid for one in raylets]}
    print(json.dumps(told), flush=True)
    for line in sys.stdin:
        (raylet,) = (one for one in raylets if one.pid == int(line))
        raylet.kill()
        raylet.wait()  # else it would stay a zombie, and its workers would take it for alive
    made.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
