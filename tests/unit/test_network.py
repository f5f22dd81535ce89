"""The interface that gloo is given, and ranks that meet nobody; with hosts: tests/integration/test_hosts.py."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from sm_train.errors import LOST
from sm_train.train.engines import EngineConfig, network
from tests import training
from tests.builders import run_module


@pytest.fixture
def several_hosts(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node-0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(network.GLOO, "")  # so that it is as before in the end
    monkeypatch.delenv(network.GLOO)
    return monkeypatch


def chosen(patch: pytest.MonkeyPatch, ways: dict[str, str | None]) -> str | None:
    """What is chosen, given this host's address on the way to others; its interfaces are lo and eth1."""
    owns = {"lo": ["127.0.0.1", "::1"], "eth1": ["10.1.2.3", "fe80::1%eth1", "fd00::3"]}
    found = {name: [SimpleNamespace(address=address) for address in own] for name, own in owns.items()}
    patch.setattr(network.psutil, "net_if_addrs", lambda: found)
    patch.setattr(network, "_own_address", ways.get)
    network.choose_interface()
    return os.environ.get(network.GLOO)


@pytest.mark.parametrize("own", ["10.1.2.3", "fd00::3", "fe80::1"])
def test_it_is_the_one_that_leads_to_rank_0(several_hosts: pytest.MonkeyPatch, own: str) -> None:
    assert chosen(several_hosts, {"node-0": own}) == "eth1"


@pytest.mark.parametrize("own", ["127.0.1.1", "127.0.0.1", "::1", None])
def test_where_rank_0_s_name_is_loopback_or_unknown_it_is_the_default_route_s(
    several_hosts: pytest.MonkeyPatch, own: str | None
) -> None:
    assert chosen(several_hosts, {"node-0": own, "192.0.2.1": "10.1.2.3"}) == "eth1"


def test_without_a_way_gloo_is_left_to_itself(several_hosts: pytest.MonkeyPatch) -> None:
    assert chosen(several_hosts, {"node-0": "127.0.0.1"}) is None


@pytest.mark.parametrize(("name", "value"), [("LOCAL_WORLD_SIZE", "4"), ("WORLD_SIZE", "1"), (network.GLOO, "bond0")])
def test_on_one_host_or_where_a_choice_was_made_nothing_changes(
    several_hosts: pytest.MonkeyPatch, name: str, value: str
) -> None:
    several_hosts.setenv(name, value)
    assert chosen(several_hosts, {"node-0": "10.1.2.3"}) == (value if name == network.GLOO else None)


def test_the_own_address_on_the_way_to_this_host_is_its_own() -> None:
    assert network._own_address("127.0.0.1") == "127.0.0.1"
    assert network._own_address("no-such-host.invalid") is None


def test_a_rank_that_meets_nobody_leaves_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = training.write_config(tmp_path / "run.yaml", training.shard_set(tmp_path / "shards"))
    port = str(training.free_port())
    place = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    assert EngineConfig(timeout_s=1, heartbeat_s=0).patience == timedelta(seconds=6)
    done = run_module("sm_train.pretrain", path, "engine.timeout_s=1", "engine.heartbeat_s=0", **place)
    assert done.returncode == LOST
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"does not find the others at 127.0.0.1, port {port}: " in line
    assert "all 2 ranks must be started" in line
    assert "Traceback" not in done.stderr


def test_a_bug_at_the_meeting_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="ours"), network.meeting():
        raise RuntimeError("a bug of ours")
