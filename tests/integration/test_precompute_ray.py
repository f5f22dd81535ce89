"""Precompute on a Ray cluster whose drivers, actors and nodes are killed: no byte of the result changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sm_train.precompute import PrecomputeConfig
from tests.integration.precompute_jobs import (
    NUM_PARTS,
    Cluster,
    command_file,
    hashes,
    log_of,
    parts,
    poisoned,
    start,
    wait_until,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, and two nodes with room for an actor each."""
    made = Cluster(head_cpus=0, nodes=2)
    yield made
    made.close()


def test_a_users_mistake_in_an_actor_is_one_line_in_the_driver(
    cfg: PrecomputeConfig, tmp_path: Path, cluster: Cluster
) -> None:
    command = (command_file(cfg, tmp_path), f"out={tmp_path / 'set'}", "encoder.layer=9")
    driver = start("cluster.precompute", *command, RAY_ADDRESS=cluster.address)
    out, err = driver.communicate(timeout=120)
    assert (driver.returncode, out) == (2, "")
    own = [line for line in err.splitlines() if "task_manager.cc" not in line]  # Ray's, on a busy machine
    assert own == [f"error: speech encoder {cfg.encoder.path} has hidden_states[0] to [3]; layer is 9"]


def test_decode_actors_make_the_same_bytes_though_one_is_killed(
    cfg: PrecomputeConfig, reference: dict[str, str], tmp_path: Path, cluster: Cluster
) -> None:
    out = tmp_path / "set"
    file = command_file(replace(cfg, decode_actors=2, decode_actor_cpus=1, actors=1), tmp_path)
    slow = poisoned(TEST_SLOW_S="0.2", RAY_ADDRESS=cluster.address)
    driver = start("cluster.precompute", file, f"out={out}", **slow)
    wait_until(lambda: parts(out) >= 2 or driver.poll() is not None)
    victim, _ = cluster.actors("DecodeActor")
    victim.kill()
    assert parts(out) < NUM_PARTS - 5
    _, err = driver.communicate(timeout=120)
    assert driver.returncode == 0, err
    assert hashes(out) == reference
    assert log_of(out, "end")[0]["deaths"] == 0


def test_driver_worker_and_node_are_killed_and_the_bytes_are_the_same(
    cfg: PrecomputeConfig, reference: dict[str, str], tmp_path: Path, cluster: Cluster
) -> None:
    out, file = tmp_path / "set", command_file(cfg, tmp_path)
    slow = poisoned(TEST_SLOW_S="0.3", RAY_ADDRESS=cluster.address)

    def reaches(count: int) -> None:
        wait_until(lambda: parts(out) >= count or driver.poll() is not None)
        assert driver.poll() is None

    driver = start("cluster.precompute", file, f"out={out}", **slow)
    reaches(2)
    driver.kill()
    driver.communicate()
    wait_until(lambda: not cluster.actors())  # whatever could still write ends by itself

    before = parts(out)
    driver = start("cluster.precompute", file, f"out={out}", **slow)
    reaches(before + 1)
    cluster.actors()[0].kill()
    reaches(before + 3)
    cluster.kill_node(cluster.nodes.pop())
    assert parts(out) < NUM_PARTS
    _, err = driver.communicate(timeout=240)
    assert driver.returncode == 0, err
    assert "Traceback" not in err
    assert hashes(out) == reference
    (end,) = log_of(out, "end")
    assert end["units"] == NUM_PARTS - before
    assert 1 <= end["deaths"] <= 3
    assert end["barred"] == 0
