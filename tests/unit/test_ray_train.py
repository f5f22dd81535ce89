"""The driver of a training on Ray: what it reads, says and ends with; tests/integration has it on a cluster."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import ray_train
from cluster.desk import Desk
from cluster.ray_train import Driver, RanksConfig, Stop
from sm_train.errors import LOST, STOPPED, UserError
from tests import training
from tests.training import free_port

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


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    return training.write_config(tmp_path / "run.yaml", tmp_path / "shards", engine={"threads": 3})


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


def test_words_of_the_places_and_of_the_stage(config_file: Path) -> None:
    asked, cfg, module = ray_train.read(["pretrain", str(config_file), "nodes=2", "ranks_per_node=4", "loop.steps=7"])
    assert (asked.nodes, asked.ranks_per_node, asked.gpus_per_node) == (2, 4, 0)
    assert cfg.loop.steps == 7
    assert module == ["sm_train.pretrain", str(config_file), "loop.steps=7"]
    assert asked.of_node(cfg.engine.threads) == {"CPU": 16.0}
    assert RanksConfig(ranks_per_node=2, gpus_per_node=2, cpus_per_rank=5).of_node(1) == {"CPU": 10.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "stage is ''; it must be one of pretrain, tune"),
        (["evaluate", "x"], "stage is 'evaluate'"),
        (["pretrain", "CONFIG", "nodes=0"], "nodes is 0; it must be at least 1"),
        (["pretrain", "CONFIG", "nodes=two"], "nodes"),
        (["pretrain", "CONFIG", "node=2"], "node"),
        (["tune", "absent.yaml"], "absent.yaml does not exist"),
    ],
)
def test_mistakes_are_named(words: list[str], said: str, config_file: Path) -> None:
    with pytest.raises(UserError, match=said):
        ray_train.read([str(config_file) if word == "CONFIG" else word for word in words])


def test_a_cluster_must_be_named_and_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match="RAY_ADDRESS names no cluster; submit with"):
        ray_train.connect()
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match="where no Ray answers"):
        ray_train.connect()


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
    monkeypatch.setattr(ray_train, "GRACE_S", 0.1)
    monkeypatch.setattr(ray_train, "_TURN_S", 0.02)
    monkeypatch.setattr(ray_train, "_SAY_S", 0.0)
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
    monkeypatch.setattr(ray_train, "GRACE_S", 0.1)
    monkeypatch.setattr(ray_train, "_TURN_S", 0.02)
    desk = Desk(1)
    desk.begin("a", [0])
    signal.raise_signal(signal.SIGINT)
    assert driver(desk, stop).follow(Future()) == STOPPED
    assert "ranks that had not saved in time are left to be killed" in capfd.readouterr().err
