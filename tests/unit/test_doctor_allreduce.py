"""Ranks by their environment, and what a measurement says; the measurement itself is in tests/integration."""

from __future__ import annotations

import json
import os

import pytest

from cluster.doctor import allreduce
from cluster.doctor.findings import FAIL, OK, WARN, Finding
from cluster.training.ranks import Place, free_port

FOUND = {"ranks": 2, "is_right": True, "mb_s": 812.0, "latency_us": 90.0}


def test_a_measurement_in_words() -> None:
    found = allreduce.judged(FOUND, "over gloo")
    assert (found.mark, found.text) == (OK, "2 ranks over gloo: 812 MB/s on the bus (64 MiB), latency 90 us")
    assert allreduce.judged({**FOUND, "is_right": False}, "over gloo").mark == FAIL


def test_ranks_of_torchrun_and_of_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", *slurm):
        monkeypatch.setenv(name, "x")  # so that what is set below is undone
        monkeypatch.delenv(name)
    assert allreduce.place() == (0, 1)
    monkeypatch.setenv("SLURM_NTASKS", "4")  # a batch script has it, and is no step
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert allreduce.place() == (0, 1)
    for name, value in {
        "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "MASTER_ADDR": "10.0.0.1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert allreduce.place() == (3, 4)
    assert [os.environ[name] for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")] == ["1", "2", "10.0.0.1"]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert allreduce.place() == (1, 2)


def test_processes_that_cannot_meet_are_reported() -> None:
    found = allreduce.here(limit_s=20, env={"GLOO_SOCKET_IFNAME": "no-such-interface"})
    assert found.mark == FAIL
    assert "GLOO_SOCKET_IFNAME" in found.remedy


def test_a_rank_that_never_comes_is_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(0, 1, 2, "127.0.0.1", free_port())
    for name, value in place.env(0).items():
        monkeypatch.setenv(name, value)
    found = allreduce.meet(limit_s=1.0)
    assert found is not None
    assert (found.mark, found.text.startswith("rank 0 of 2 on ")) == (FAIL, True)
    assert "MASTER_ADDR" in found.remedy


def test_findings_that_have_no_room_are_counted() -> None:
    many = [*(Finding(WARN, "cpus", "x" * 1000, "y") for _ in range(50)), Finding(FAIL, "shm", "0.1 GiB free", "z")]
    rows = json.loads(allreduce.packed(many, "rank 1"))
    assert rows[0] == [FAIL, "shm", "rank 1: 0.1 GiB free", "z"]
    assert rows[-1][2] == f"rank 1: {len(many) - len(rows) + 1} more findings"
    assert 30 < len(rows) < 40
    assert json.loads(allreduce.packed([Finding(FAIL, "shm", "x" * 40_000, "z")], "r"))[0][:3] == [
        FAIL, "ranks", "r: 1 more findings",
    ]  # fmt: skip
    assert len(json.loads(allreduce.packed(many[:2], "r"))) == 2
