"""The watch where it has nothing to do, what it takes for a collective's error, and ranks that outlive their launcher.

What it is for is tested on real ranks: tests/integration/test_watch.py.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from sm_train.train.engines import EngineConfig, base
from sm_train.train.engines.watch import Watch, is_collective
from tests import training


@pytest.mark.parametrize(("world_size", "heartbeat_s"), [(1, 10.0), (2, 0.0)])
def test_without_other_ranks_or_switched_off_it_does_nothing(world_size: int, heartbeat_s: float) -> None:
    watch = Watch(0, world_size, heartbeat_s, 600)
    before = threading.active_count()
    watch.start(torch.device("cpu"))
    watch.mark("forward")
    with pytest.raises(KeyError), watch:
        raise KeyError
    watch.close()
    assert threading.active_count() == before
    assert (watch.marks, watch.doing) == (1, "forward")


@pytest.mark.parametrize("heartbeat_s", [-1, 0.5])
def test_a_heartbeat_that_is_too_short_is_refused(heartbeat_s: float) -> None:
    with pytest.raises(ValueError, match=r"engine\.heartbeat_s"):
        EngineConfig(heartbeat_s=heartbeat_s)


def test_the_watch_is_more_impatient_than_a_collective() -> None:
    cfg = EngineConfig(timeout_s=3, heartbeat_s=2)
    assert cfg.patience.total_seconds() > cfg.timeout_s + cfg.heartbeat_s


def raised(work: object) -> BaseException:
    with pytest.raises(Exception) as found:  # noqa: PT011
        work()  # type: ignore[operator]
    return found.value


def test_only_what_comes_out_of_a_collective_is_one_s_error() -> None:
    assert is_collective(dist.DistNetworkError("gone"))
    assert not is_collective(raised(lambda: torch.ones(2) @ torch.ones(3)))
    assert not is_collective(raised(lambda: 1 / 0))

    def work() -> None:
        base.start_ranks(EngineConfig(device="cpu"))
        if dist.get_rank() == 1:
            os._exit(0)
        assert is_collective(raised(lambda: dist.all_reduce(torch.ones(1))))

    assert training.in_ranks(2, work) == [0, 0]


def test_a_rank_whose_launcher_died_before_it_could_ask_to_die_with_it_is_ended() -> None:
    news, write = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        if os.fork() > 0:
            time.sleep(0.2)
            os._exit(0)
        before = os.getppid()
        real = ctypes.CDLL(None).prctl

        def late(*words: int) -> None:
            while os.getppid() == before:
                time.sleep(0.02)
            real(*words)

        ctypes.CDLL = lambda name: SimpleNamespace(prctl=late)  # type: ignore[assignment,misc]
        os.environ["TORCHELASTIC_RUN_ID"] = "run"
        os.write(write, b"began ")
        base._die_with_launcher()
        os.write(write, b"lives")
        os._exit(0)
    os.close(write)
    os.waitpid(launcher, 0)
    with os.fdopen(news, "rb") as file:
        assert file.read() == b"began "
