"""The machine: each check on this one, and on a state that is bad."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

import pytest

from cluster.doctor import machine
from cluster.doctor.findings import FAIL, OK, WARN


def test_memory() -> None:
    total, free = machine.host_bytes()
    assert 0 < free < total
    assert machine.memory(lambda: (64e9, 32e9)).mark == OK
    assert machine.memory(lambda: (64e9, 1e9)).mark == FAIL


def test_memory_of_control_groups(tmp_path: Path) -> None:
    def put(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    put("proc/meminfo", "MemTotal: 1000 kB\nMemAvailable: 900 kB\n")
    assert machine.host_bytes(tmp_path) == (1_024_000, 921_600)
    put("proc/self/cgroup", "0::/job/step\n")
    groups = {"job": ("500000", "400000", 100_000), "job/step": ("max", "300000", 0)}
    for name, (most, used, cache) in groups.items():
        put(f"sys/fs/cgroup/{name}/memory.max", f"{most}\n")
        put(f"sys/fs/cgroup/{name}/memory.current", f"{used}\n")
        put(f"sys/fs/cgroup/{name}/memory.stat", f"anon 5\ninactive_file {cache}\n")
    assert machine.host_bytes(tmp_path) == (500_000, 200_000)  # the step has no limit, and its job has
    put("sys/fs/cgroup/job/step/memory.max", "350000")
    assert machine.host_bytes(tmp_path) == (350_000, 50_000)
    put("proc/self/cgroup", "4:memory:/job\n3:cpuset:/\n")
    put("sys/fs/cgroup/memory/memory.limit_in_bytes", "600000")  # a container's own, though its path is another
    put("sys/fs/cgroup/memory/memory.usage_in_bytes", "500000")
    put("sys/fs/cgroup/memory/memory.stat", "total_inactive_file 50000")
    assert machine.host_bytes(tmp_path) == (600_000, 150_000)


def test_shared_memory(tmp_path: Path) -> None:
    assert machine.shm(tmp_path, least=1).mark == OK
    small = machine.shm(tmp_path, least=1 << 60)
    assert (small.mark, "--shm-size" in small.remedy) == (FAIL, True)
    assert machine.shm(tmp_path / "none").mark == FAIL


def test_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        found = machine.open_files()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (found.mark, found.text.startswith("256 at once")) == (WARN, True)
    assert machine.open_files(least=1).mark == OK


def test_cpus() -> None:
    assert machine.cpus(1024).mark == OK
    few = machine.cpus(0)
    assert (few.mark, "OMP_NUM_THREADS=1" in few.remedy) == (WARN, True)


def test_a_folder_of_a_disk(tmp_path: Path) -> None:
    found = machine.file_system(tmp_path / "runs/later")
    assert found.mark in (OK, WARN)  # a warning where temporary folders are not on a disk
    assert str(tmp_path) in found.text
    assert list(tmp_path.iterdir()) == []  # the probe is gone, and the folder not made


def test_a_folder_that_cannot_be_written() -> None:
    found = machine.file_system(Path("/proc/self/runs"))
    assert found.mark == FAIL
    assert "cannot be written" in found.text


@pytest.mark.parametrize(("lacking", "mark"), [(("symlink",), FAIL), (("link",), WARN), (("replace",), FAIL)])
def test_a_file_system_that_lacks_a_call(
    lacking: tuple[str, ...], mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    for name in lacking:
        monkeypatch.setattr(os, name, refuse)
    assert machine.file_system(tmp_path).mark == mark
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_by_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.kind_of(Path("/proc/self")) == "proc"
    for kind, mark in (("ext4", OK), ("xfs", OK), ("nfs4", WARN), ("fuse.sshfs", WARN), ("tmpfs", WARN)):
        monkeypatch.setattr(machine, "kind_of", lambda path, kind=kind: kind)
        assert machine.file_system(tmp_path).mark == mark


def test_a_file_server_whose_clock_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = time.time
    monkeypatch.setattr(time, "time", lambda: true() - 3600)
    found = machine.file_system(tmp_path)
    assert (found.mark, "clock is 3600 s ahead" in found.text) == (WARN, True)
