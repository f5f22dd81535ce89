"""Two hosts train together, lose each other in mid-run and go on; each has an address and a name of its own."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import submit
from sm_train import files
from sm_train.errors import LOST
from tests import training
from tests.hosts import Host, Hosts
from tools.compare_runs import compare

pytestmark = pytest.mark.slow
STEPS, SAVE_EVERY = 80, 5
SETTINGS = {
    "engine": {"heartbeat_s": 4, "timeout_s": 60},
    "loop": {"steps": STEPS, "log_every": 10, "save_every": SAVE_EVERY, "validate_every": 0},
}
BOUND_S = 60
Commands = list[tuple[list[str], dict[str, str]]]
"""For each node, what it runs, and its environment."""


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


def submitted(path: Path, first: Host, port: int) -> Commands:
    """The lines that cluster.submit prints for nodes that are started by hand: torchrun, with the code as it was."""
    place = ["to=local", "nodes=2", "ranks_per_node=1", f"master_addr={first.name}", f"master_port={port}"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        submit.main(["pretrain", str(path), *place])
    lines = [re.fullmatch(r"node (\d): (.*)", line) for line in said.getvalue().splitlines()]
    assert [line and line[1] for line in lines] == ["0", "1"], said.getvalue()
    return [(shlex.split(line[2]), {}) for line in lines if line]


def by_environment(path: Path, first: Host, port: int) -> Commands:
    """What srun or Ray Train starts on each node: the place of the rank is in its environment."""
    common = {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": first.address}
    environments = [{**common, "MASTER_PORT": str(port), "RANK": str(node)} for node in (0, 1)]
    return [([sys.executable, "-m", "sm_train.pretrain", str(path)], environment) for environment in environments]


@pytest.mark.parametrize(
    ("launch", "own_name", "cut", "code"),
    [(submitted, "127.0.1.1", "unplugged", 1), (by_environment, "unknown", "link down", LOST)],
    ids=["submitted-and-vanishing-packets", "environment-and-a-link-that-is-down"],
)
def test_hosts_that_lose_each_other_stop_and_go_on_to_the_weights_of_one_host(
    tmp_path: Path,
    shard_folder: Path,
    one_host: Path,
    launch: Callable[[Path, Host, int], Commands],
    own_name: str,
    cut: str,
    code: int,
) -> None:
    path = training.write_config(tmp_path / "run.yaml", shard_folder, **SETTINGS)
    run, network = path.with_suffix(""), Hosts(tmp_path, own_name=own_name)

    def start() -> list[subprocess.Popen[str]]:
        return [
            host.start(command, path.with_suffix(f".said-{node}"), **environment)
            for node, (host, (command, environment)) in enumerate(zip(hosts, commands, strict=True))
        ]

    def said(node: int) -> str:
        return path.with_suffix(f".said-{node}").read_text()

    with network as hosts:
        commands = launch(path, hosts[0], training.free_port())
        begun = start()
        training.wait_for(lambda: (run / "checkpoints/latest").exists() or any(p.poll() is not None for p in begun))
        network.unplug(hosts[1]) if cut == "unplugged" else hosts[1].link("down")
        assert [process.wait(BOUND_S) for process in begun] == [code, code], said(0) + said(1)
        assert not any(host.pids for host in hosts)
        for node in (0, 1):
            assert f"error: rank {1 - node} (host node-{1 - node}, pid " in said(node)
            assert f"has not been heard from for 4 s; rank {node} leaves at mark" in said(node)
            assert launch is by_environment or f"exitcode  : {LOST}" in said(node)
        ended = files.read_json(run / "attempts/1.json")
        assert ended["how"].startswith("rank 1 (host node-1, pid")
        assert SAVE_EVERY <= ended["at_step"] < STEPS

        network.plug(hosts[1])
        hosts[1].link("up")
        begun = start()
        assert [process.wait(BOUND_S) for process in begun] == [0, 0], said(0) + said(1)
    assert files.read_json(run / "attempts/2.json")["from_step"] >= SAVE_EVERY
    assert os.readlink(run / "checkpoints/latest") == f"step-{STEPS}"
    found = compare(run, one_host, 0.0)
    assert found.equal, str(found)
