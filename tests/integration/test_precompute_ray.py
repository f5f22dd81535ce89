"""Precompute over Ray, where driver, actors and nodes are killed: no byte of the result changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from sm_train.precompute import PrecomputeConfig
from tests import builders
from tests.integration.precompute_jobs import (
    NUM_PARTS,
    Cluster,
    actors_below,
    command_file,
    hashes,
    log_of,
    parts,
    poisoned,
    start,
    wait_until,
)

pytestmark = pytest.mark.slow


@pytest.fixture
def no_ray_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def family(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def end_all(helpers: list[psutil.Process]) -> None:
    """Whatever could still write must end by itself; Ray's own agents notice the death of a driver late."""
    writers = [process for process in helpers if process.is_running() and "Agent" not in process.name()]
    _, left = psutil.wait_procs(writers, timeout=30)
    assert not left
    for process in helpers:
        if process.is_running():
            process.kill()


def test_two_ray_actors_make_the_same_bytes_though_driver_and_worker_are_killed(
    cfg: PrecomputeConfig, reference: dict[str, str], tmp_path: Path, no_ray_address: None
) -> None:
    out, file = tmp_path / "set", command_file(cfg, tmp_path)
    driver = start("cluster.precompute", file, f"out={out}")
    wait_until(lambda: parts(out) >= 2 or driver.poll() is not None)
    helpers = family(driver.pid)
    driver.kill()
    driver.communicate()
    assert 2 <= parts(out) < NUM_PARTS - 3
    end_all(helpers)

    before = parts(out)
    driver = start("cluster.precompute", file, f"out={out}")
    wait_until(lambda: len(actors_below([driver.pid])) == 2 or driver.poll() is not None)
    workers = actors_below([driver.pid])
    wait_until(lambda: parts(out) > before or driver.poll() is not None)
    workers[0].kill()
    assert parts(out) < NUM_PARTS
    helpers = family(driver.pid)
    _, err = driver.communicate(timeout=240)
    assert driver.returncode == 0, err
    assert "Traceback" not in err
    assert hashes(out) == reference
    (end,) = log_of(out, "end")
    assert (end["deaths"], end["barred"]) == (1, 0)
    assert end["units"] == NUM_PARTS - before
    _, left = psutil.wait_procs(helpers, timeout=30)
    assert not left


def test_a_users_mistake_in_an_actor_is_one_line_in_the_driver(
    cfg: PrecomputeConfig, tmp_path: Path, no_ray_address: None
) -> None:
    done = builders.run_module(
        "cluster.precompute", command_file(cfg, tmp_path), f"out={tmp_path / 'set'}", "encoder.layer=9"
    )
    assert (done.returncode, done.stdout) == (2, "")
    own = [line for line in done.stderr.splitlines() if "task_manager.cc" not in line]  # Ray's, on a busy machine
    assert own == [f"error: speech encoder {cfg.encoder.path} has hidden_states[0] to [3]; layer is 9"]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, and two nodes with room for an actor each."""
    made = Cluster(head_cpus=0, nodes=2)
    yield made
    made.close()


def test_a_lost_node_is_no_loss(
    cfg: PrecomputeConfig, reference: dict[str, str], tmp_path: Path, cluster: Cluster
) -> None:
    out, file = tmp_path / "set", command_file(cfg, tmp_path)
    slow = poisoned(TEST_SLOW_S="0.3", RAY_ADDRESS=cluster.address)
    driver = start("cluster.precompute", file, f"out={out}", **slow)
    wait_until(lambda: parts(out) >= 4 or driver.poll() is not None)
    cluster.kill_node(cluster.nodes.pop())
    assert parts(out) < NUM_PARTS - 3
    _, err = driver.communicate(timeout=120)
    assert driver.returncode == 0, err
    assert hashes(out) == reference
    (end,) = log_of(out, "end")
    assert (end["deaths"], end["barred"]) == (1, 0)


def test_decode_actors_make_the_same_bytes_though_one_is_killed(
    cfg: PrecomputeConfig, reference: dict[str, str], tmp_path: Path, no_ray_address: None
) -> None:
    out = tmp_path / "set"
    file = command_file(replace(cfg, decode_actors=2, decode_actor_cpus=1, actors=1), tmp_path)
    driver = start("cluster.precompute", file, f"out={out}", **poisoned(TEST_SLOW_S="0.2"))
    wait_until(lambda: parts(out) >= 2 or driver.poll() is not None)
    (victim, _) = actors_below([driver.pid], "DecodeActor")
    victim.kill()
    assert parts(out) < NUM_PARTS - 5
    _, err = driver.communicate(timeout=120)
    assert driver.returncode == 0, err
    assert hashes(out) == reference
    (end,) = log_of(out, "end")
    assert end["deaths"] == 0
