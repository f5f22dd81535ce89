"""What the tests of precompute share: its jobs as processes, and their results as hashes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from sm_train import config
from sm_train.meter import LOG
from sm_train.precompute import PrecomputeConfig, in_this_process, run
from tests import builders

NUM_PARTS = 15


def command_file(cfg: PrecomputeConfig, folder: Path) -> Path:
    path = folder / "cfg.yaml"
    path.write_text(yaml.safe_dump(config.to_mapping(cfg)))
    return path


def hashes(root: Path) -> dict[str, str]:
    """Of every file but the measurements."""
    found = [path for path in root.rglob("*") if path.is_file() and path.name != LOG]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def parts(root: Path) -> int:
    return len(list(root.glob("part-*")))


def log_of(root: Path, event: str) -> list[dict[str, Any]]:
    """The lines of one kind in a set's log."""
    lines = (root / LOG).read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == event]


def start(module: str, *argv: object, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, argv)],
        cwd=builders.ROOT, env=builders.child_env(**env), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def poisoned(**env: str) -> dict[str, str]:
    """The environment in which some files end the process that reads or encodes them; see tests/poison."""
    return {"PYTHONPATH": os.pathsep.join([str(builders.ROOT / "tests/poison"), str(builders.ROOT)]), **env}


def run_killed(cfg: PrecomputeConfig, at_call: int) -> bool:
    """Run in a fork that SIGKILLs itself just before its n-th sync or rename; returns whether it was killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            _die_at_call(at_call)
            run(cfg, in_this_process)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def _die_at_call(at_call: int) -> None:
    calls = 0

    def counting(real: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object) -> object:
            nonlocal calls
            calls += 1
            if calls == at_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        return counted

    os.fsync, os.rename, os.replace = map(counting, (os.fsync, os.rename, os.replace))


def actors_below(pids: list[int], kind: str = "EncodingActor") -> list[psutil.Process]:
    """The actors of a kind among the descendants of processes."""
    found = []
    for pid in pids:
        try:
            for process in psutil.Process(pid).children(recursive=True):
                found += [process] if kind in " ".join(process.cmdline()) else []
        except psutil.NoSuchProcess:
            continue
    return found


class Cluster:
    """A Ray cluster on this machine: a head, and nodes beside it that may be killed.

    Args:
        head_cpus: of the head's node, to which drivers are connected.
        nodes: those beside it, of two CPUs each.
    """

    def __init__(self, head_cpus: int, nodes: int) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        from ray.cluster_utils import Cluster as Raylets

        quick = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_timeout_ms": 1000}
        head = {"num_cpus": head_cpus, "object_store_memory": 80 << 20, "_system_config": quick}
        self._raylets = Raylets(initialize_head=True, head_node_args=head)
        self.address: str = self._raylets.address
        self.nodes = [self.add_node() for _ in range(nodes)]

    def add_node(self) -> Any:
        """One more node."""
        return self._raylets.add_node(num_cpus=2, object_store_memory=80 << 20)

    def replace_node(self, rng: random.Random) -> None:
        """Kill one and start another."""
        self.kill_node(self.nodes.pop(rng.randrange(len(self.nodes))))
        self.nodes.append(self.add_node())

    def kill_node(self, node: Any) -> None:
        """What the loss of a machine does: all its processes are gone at once."""
        raylet = psutil.Process(_raylet_of(node))
        for process in [raylet, *raylet.children(recursive=True)]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self._raylets.remove_node(node, allow_graceful=False)

    def actors(self, kind: str = "EncodingActor") -> list[psutil.Process]:
        """The actors of a kind on all nodes."""
        return actors_below([_raylet_of(node) for node in (self._raylets.head_node, *self.nodes)], kind)

    def close(self) -> None:
        """End everything."""
        self._raylets.shutdown()


def _raylet_of(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def wait_until(holds: Callable[[], object], timeout_s: float = 180.0) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)
