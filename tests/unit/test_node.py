"""What a node does with its ranks: real processes, two nodes of one desk."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster.training import node as train_node
from cluster.training.desk import Desk
from cluster.training.node import NodeJob, RanksLost
from cluster.training.ranks import Place
from sm_train.errors import LOST, STOPPED
from tests.training import wait_for

SAVES = "signal.signal(15, lambda *_: sys.exit(75)); print('up', flush=True); time.sleep(60)"
HANGS = "signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
LEAVES = f"time.sleep(0.2); sys.exit({LOST})"
DIES = "os.kill(os.getpid(), 9)"


class Run:
    """Two nodes of one rank each, whose ranks do what a line of Python says."""

    def __init__(self, folder: Path, *acts: str, stop_s: float = 30.0) -> None:
        cases = "".join(f"if os.environ['RANK'] == '{rank}':\n    {act}\n" for rank, act in enumerate(acts))
        (folder / "rank_of_a_test.py").write_text(f"import os, signal, sys, time\n{cases}")
        self.desk, self._lock = Desk(2), threading.Lock()
        job = NodeJob(("rank_of_a_test",), 1, str(folder / "logs"), str(folder), {}, stop_s, None)
        pool = ThreadPoolExecutor(2)
        places = [Place(node, 2, 1, "127.0.0.1", 1) for node in (0, 1)]
        self.nodes: list[Future[int]] = [pool.submit(train_node.stay, job, place, self.ask) for place in places]

    def ask(self, method: str, *said: Any) -> Any:
        """As an actor has it: one call at a time."""
        with self._lock:
            return getattr(self.desk, method)("first", *said)

    def ends(self) -> list[int | str]:
        """What each node returns, or the error it raises."""
        return [str(error) if (error := node.exception(60)) else node.result() for node in self.nodes]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(train_node, "GRACE_S", 1.0)
    monkeypatch.setattr(train_node, "_POLL_S", 0.05)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_ranks_that_are_done(tmp_path: Path) -> None:
    run = Run(tmp_path, "print('one')", "print('two')")
    assert run.ends() == [0, 0]
    assert run.desk.news().output == b"one\n"
    assert (tmp_path / "logs/rank-1.log").read_text() == "two\n"


def test_one_rank_s_mistake_ends_all_though_another_hangs(tmp_path: Path) -> None:
    run = Run(tmp_path, HANGS, "sys.exit(2)")
    assert run.ends() == [2, 2]
    assert run.desk.news().ended == {1: (2, "")}


def test_a_rank_that_dies_is_a_loss_for_all(tmp_path: Path) -> None:
    run = Run(tmp_path, LEAVES, DIES)
    assert run.ends() == ["rank 0 left, as another rank was lost", "rank 1 killed by SIGKILL"]
    with pytest.raises(RanksLost):
        run.nodes[1].result()


def test_a_rank_that_is_alone_in_its_loss_does_not_wait_for_ever(tmp_path: Path) -> None:
    run = Run(tmp_path, SAVES, DIES)
    assert "SIGKILL" in str(run.nodes[1].exception(60))
    run.desk.stop()
    assert run.nodes[0].result(60) == STOPPED


def test_a_stop_reaches_the_ranks_and_they_save(tmp_path: Path) -> None:
    run = Run(tmp_path, SAVES, SAVES)
    wait_for(lambda: (tmp_path / "logs/rank-1.log").exists() and run.desk.news().output == b"up\n", 20)
    wait_for(lambda: (tmp_path / "logs/rank-1.log").read_text() == "up\n", 20)
    run.desk.stop()
    assert run.ends() == [STOPPED, STOPPED]
    assert run.desk.news().ended == {0: (STOPPED, "up\n"), 1: (STOPPED, "up\n")}


def test_ranks_that_do_not_save_in_time_are_killed(tmp_path: Path) -> None:
    run = Run(tmp_path, HANGS, HANGS, stop_s=0.2)
    wait_for(lambda: run.desk.news().output == b"up\n", 20)
    run.desk.stop()
    assert run.ends() == [STOPPED, STOPPED]


def test_nothing_is_started_once_a_stop_was_asked_for(tmp_path: Path) -> None:
    desk = Desk(1)
    desk.stop()
    job = NodeJob(("absent",), 1, str(tmp_path / "logs"), str(tmp_path), {}, 1.0, None)
    place = Place(0, 1, 1, "127.0.0.1", 1)
    assert train_node.stay(job, place, lambda method, *said: getattr(desk, method)("first", *said)) == STOPPED
    assert not (tmp_path / "logs").exists()
