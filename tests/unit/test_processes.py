"""Processes by identity: alive, ended, a zombie, another one of the same pid, one of another machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sm_train.data import processes


def test_this_process_and_its_parent_are_alive() -> None:
    assert not processes.is_gone(processes.own())
    pid, start, machine = processes.own().split("-")
    assert int(pid) == os.getpid()
    assert start
    assert machine


def test_one_that_ended_is_gone_even_before_anybody_asks_for_its_code() -> None:
    show = "from sm_train.data import processes; print(processes.own(), flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", show], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    identity = child.stdout.readline().strip()
    assert not processes.is_gone(identity)
    child.kill()
    child.stdout.read()  # closed at its end, at which it is a zombie
    while not processes.is_gone(identity):
        assert child.returncode is None
    child.communicate()
    assert processes.is_gone(identity)


def test_a_pid_that_was_given_again_and_an_unknown_machine() -> None:
    pid, start, machine = processes.own().split("-")
    assert processes.is_gone(f"{pid}-{int(start) - 1}-{machine}")
    assert not processes.is_gone(f"{pid}-{int(start) - 1}-0123456789ab")
    for nonsense in ("", "x", "1-2", "--", f"{pid}-1-", f"no-1-{machine}"):
        assert not processes.is_gone(nonsense)


def test_one_that_proc_hides_is_gone_only_if_nothing_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    pid, start, machine = processes.own().split("-")
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()

    def hidden(path: Path) -> bytes:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_bytes", hidden)
    assert not processes.is_gone(f"{pid}-{start}-{machine}")
    assert not processes.is_gone(f"1-1-{machine}")  # another's, unless we are root
    assert processes.is_gone(f"{child.pid}-1-{machine}")
    assert processes.is_gone(f"{'9' * 30}-1-{machine}")
