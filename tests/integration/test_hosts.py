"""Two hosts train together, lose each other in mid-run and go on; each has an address and a name of its own."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sm_train import files
from sm_train.errors import LOST
from tests import training
from tests.hosts import Host, Hosts
from tools.compare_runs import compare

pytestmark = pytest.mark.slow
STEPS, SAVE_EVERY = 80, 5
SETTINGS = {
    "engine": {"heartbeat_s": 2, "timeout_s": 60},
    "loop": {"steps": STEPS, "log_every": 10, "save_every": SAVE_EVERY, "validate_every": 0},
}
BOUND_S = 60
Launch = Callable[[Path, int, Host, int], tuple[list[object], dict[str, str]]]
"""The command that a node runs, and its environment: of the config, the node, rank 0's host and port."""


@pytest.fixture(scope="module")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training.shard_set(tmp_path_factory.mktemp("hosts") / "shards")


@pytest.fixture(scope="module")
def one_host(tmp_path_factory: pytest.TempPathFactory, shard_folder: Path) -> Path:
    """The folder of an undisturbed run of two ranks on one host."""
    importlib.import_module("torch.utils.tensorboard")
    path = training.write_config(tmp_path_factory.mktemp("one-host") / "run.yaml", shard_folder, **SETTINGS)
    assert training.in_ranks(2, lambda: training.train(path)) == [0, 0]
    return path.with_suffix("")


def by_torchrun(path: Path, node: int, first: Host, port: int) -> tuple[list[object], dict[str, str]]:
    """The line that a person starts on each node."""
    where = ["--nnodes", 2, "--master-addr", first.name, "--master-port", port, "--node-rank", node]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 1, *where]
    return [*torchrun, "-m", "sm_train.pretrain", path], {}


def by_environment(path: Path, node: int, first: Host, port: int) -> tuple[list[object], dict[str, str]]:
    """What srun starts on each node."""
    place = {"RANK": str(node), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    meeting = {"MASTER_ADDR": first.address, "MASTER_PORT": str(port)}
    return [sys.executable, "-m", "sm_train.pretrain", path], {**place, **meeting}


def start(hosts: list[Host], path: Path, launch: Launch, port: int) -> list[subprocess.Popen[str]]:
    """Start the run on each host; what it says there goes to ``run.said-NODE``."""
    begun = []
    for node, host in enumerate(hosts):
        command, environment = launch(path, node, hosts[0], port)
        begun.append(host.start(command, path.with_suffix(f".said-{node}"), **environment))
    return begun


@pytest.mark.parametrize(
    ("launch", "own_name", "cut", "code"),
    [(by_torchrun, "127.0.1.1", "unplugged", 1), (by_environment, "unknown", "link down", LOST)],
    ids=["torchrun-and-vanishing-packets", "environment-and-a-link-that-is-down"],
)
def test_hosts_that_lose_each_other_stop_and_go_on_to_the_weights_of_one_host(
    tmp_path: Path, shard_folder: Path, one_host: Path, launch: Launch, own_name: str, cut: str, code: int
) -> None:
    path = training.write_config(tmp_path / "run.yaml", shard_folder, **SETTINGS)
    run, port = path.with_suffix(""), training.free_port()
    network = Hosts(tmp_path, own_name=own_name)

    def said(node: int) -> str:
        return path.with_suffix(f".said-{node}").read_text()

    with network as hosts:
        begun = start(hosts, path, launch, port)
        training.wait_for(lambda: (run / "checkpoints/latest").exists() or any(p.poll() is not None for p in begun))
        network.unplug(hosts[1]) if cut == "unplugged" else hosts[1].link("down")
        assert [process.wait(BOUND_S) for process in begun] == [code, code], said(0) + said(1)
        assert not any(host.pids for host in hosts)
        for node in (0, 1):
            assert f"error: rank {1 - node} (host node-{1 - node}, pid " in said(node)
            assert f"has not been heard from for 2 s; rank {node} leaves at mark" in said(node)
            assert launch is by_environment or f"exitcode  : {LOST}" in said(node)
        ended = files.read_json(run / "attempts/1.json")
        assert ended["how"].startswith("rank 1 (host node-1, pid")
        assert SAVE_EVERY <= ended["at_step"] < STEPS

        network.plug(hosts[1])
        hosts[1].link("up")
        begun = start(hosts, path, launch, port)
        assert [process.wait(BOUND_S) for process in begun] == [0, 0], said(0) + said(1)
    assert files.read_json(run / "attempts/2.json")["from_step"] >= SAVE_EVERY
    assert os.readlink(run / "checkpoints/latest") == f"step-{STEPS}"
    found = compare(run, one_host, 0.0)
    assert found.equal, str(found)
