"""The driver of a training on Ray: what it says, passes on and ends with; tests/integration has it on a cluster."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.ray_train import RanksConfig
from cluster.training import driver as ray_driver
from cluster.training.desk import Desk
from cluster.training.driver import Driver, Stop
from sm_train.errors import LOST, STOPPED

RESOURCES = {"CPU": 2.0}


class Ray:
    """Stands for a cluster that holds a desk: calls are answered when they are made."""

    def __init__(self, desk: Desk) -> None:
        self.desk = SimpleNamespace(
            news=SimpleNamespace(remote=desk.news), stop=SimpleNamespace(remote=desk.stop)
        )  # fmt: skip

    def get(self, answer: Any) -> Any:
        """What a call has answered."""
        return answer

    def nodes(self) -> list[dict[str, Any]]:
        """A head, a node, and one that is lost."""
        return [{"Alive": alive, "Resources": {"CPU": cpus}} for alive, cpus in ((True, 0), (True, 4), (False, 4))]

    def available_resources(self) -> dict[str, float]:
        """What is free."""
        return {"CPU": 1.0}


@pytest.fixture
def stop() -> Iterator[Stop]:
    """With the handlers as they were, afterwards."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield Stop()
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def driver(desk: Desk, stop: Stop) -> Driver:
    ray = Ray(desk)
    return Driver(RanksConfig(nodes=2, stop_s=1.0), RESOURCES, ray, ray.desk, stop)


def done(result: Any) -> Future[Any]:
    future: Future[Any] = Future()
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(SimpleNamespace(return_value=result))
    return future


def test_what_rank_0_prints_is_printed_and_the_code_is_the_ranks_own(
    stop: Stop, capfd: pytest.CaptureFixture[str]
) -> None:
    desk = Desk(12)
    desk.begin("a", list(range(12)))
    desk.exchange("a", dict.fromkeys(range(1, 11), (LOST, "x")) | {11: (2, "words\nerror: \x1b[1mit")}, b"step 1\n")
    assert driver(desk, stop).follow(done(2)) == 2
    out, err = capfd.readouterr()
    assert out == "step 1\n"
    assert err.splitlines() == [
        "rank 11: ended with code 2",
        "rank 11: words",
        "rank 11: error: \\x1b[1mit",
        "rank 1, 2, 3, 4, 5, 6, 7, 8 and 2 more: left, as another rank was lost",
    ]


def test_a_line_that_all_ranks_say_is_printed_once(stop: Stop, capfd: pytest.CaptureFixture[str]) -> None:
    desk = Desk(2)
    desk.begin("a", [0, 1])
    desk.exchange("a", {1: (2, "error: it\n")}, b"")
    here = driver(desk, stop)
    here._show()
    desk.exchange("a", {0: (2, "a step\nerror: it\n")}, b"a step\nerror: it\n")
    assert here.follow(done(2)) == 2
    out, err = capfd.readouterr()
    assert out == "a step\nerror: it\n"
    assert err == "rank 0, 1: ended with code 2\n"


def test_ranks_that_are_lost_too_often(stop: Stop, capfd: pytest.CaptureFixture[str]) -> None:
    desk = Desk(2)
    desk.begin("a", [0, 1])
    from ray.train import WorkerGroupError

    lost = done(WorkerGroupError("it", {1: RuntimeError("rank 1 killed by SIGKILL")}))
    assert driver(desk, stop).follow(lost) == LOST
    assert "ranks were lost 1 times, max_restarts is 10; node 1: rank 1 killed by SIGKILL" in capfd.readouterr().err


def test_a_stop_while_no_rank_is_at_work_ends_at_once(
    stop: Stop, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_driver, "GRACE_S", 0.1)
    monkeypatch.setattr(ray_driver, "_TURN_S", 0.02)
    monkeypatch.setattr(ray_driver, "_SAY_S", 0.0)
    desk = Desk(2)
    signal.raise_signal(signal.SIGTERM)
    assert driver(desk, stop).follow(Future()) == STOPPED
    assert desk.begin("a", [0])
    said = capfd.readouterr().err
    assert said.count("asked to stop: ranks have 1 s to save in") == 1
    assert said.count("waiting for 2 nodes with 2 CPUs and 0 GPUs free on each; the cluster has 2 nodes (0 CPUs") == 1


def test_ranks_that_do_not_leave_are_left_behind(
    stop: Stop, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_driver, "GRACE_S", 0.1)
    monkeypatch.setattr(ray_driver, "_TURN_S", 0.02)
    desk = Desk(1)
    desk.begin("a", [0])
    signal.raise_signal(signal.SIGINT)
    assert driver(desk, stop).follow(Future()) == STOPPED
    assert "ranks that had not saved in time are left to be killed" in capfd.readouterr().err
