"""Decoding processes that are stopped, killed, starved and abandoned."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from sm_train.data import processes
from sm_train.data.manifest import read_manifest
from sm_train.encoding import decoders
from sm_train.encoding.decode import DecodeConfig
from sm_train.encoding.decoders import Decoded, DecodePool
from sm_train.records import Quarantined, Utterance
from tests import builders

# A process with a pool, which says which process decodes for it, and stays.
PARENT = """
import sys
from sm_train.encoding.decode import DecodeConfig
from sm_train.encoding.decoders import DecodePool
from sm_train.records import Utterance

pool = DecodePool(DecodeConfig("/", 5.0, -80.0, 1, None, None), 1, 60.0)
pool.submit(Utterance("a", "none.wav", 0.0, 1.0, "text", "", "", "")).result()
print(pool._children[0]._process.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def utterances(tmp_path_factory: pytest.TempPathFactory) -> list[Utterance]:
    folder = tmp_path_factory.mktemp("corpus")
    found = read_manifest(builders.corpus(folder, 6))
    return [replace(utterance, audio=str(folder / utterance.audio)) for utterance in found]


@pytest.fixture
def pool() -> Iterator[DecodePool]:
    made = DecodePool(DecodeConfig("/", 60.0, -80.0, 1, None, None), 1, 60.0)
    yield made
    made.close(abandon=True)


def pid_of(pool: DecodePool) -> int:
    return pool._children[0]._process.pid


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_one_that_is_at_work_ends_with_the_process_it_works_for() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=builders.ROOT, env=builders.child_env(),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    identity = f"{pid}-{processes._start(pid)}-{processes.own().split('-')[2]}"
    os.kill(pid, signal.SIGSTOP)  # so that it does not see the end of its input, as in a long decode
    try:
        assert not processes.is_gone(identity)
        parent.kill()
        wait_until(lambda: processes.is_gone(identity))
    finally:
        parent.kill()
        parent.communicate()
        if not processes.is_gone(identity):
            os.kill(pid, signal.SIGKILL)


def test_a_lower_limit_of_memory_is_kept() -> None:
    limit = 4 << 30
    done = subprocess.run(
        [sys.executable, "-m", "sm_train.encoding.decode", str(os.getpid())], cwd=builders.ROOT,
        env=builders.child_env(), input=json.dumps(asdict(DecodeConfig("/", 5.0, -80.0, 1, None, None))).encode(),
        capture_output=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)), check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, b"\2\0\0\0{}"), done.stderr


def test_a_bug_at_one_utterance_is_its_own_and_the_process_stays(pool: DecodePool, utterances: list[Utterance]) -> None:
    assert isinstance(pool.submit(utterances[0]).result(), Decoded)
    before = pid_of(pool)
    found = pool.submit(replace(utterances[0], text=cast(str, None))).result()
    assert found == Quarantined("utt-000", "undecodable", "AttributeError: 'NoneType' object has no attribute 'strip'")
    assert isinstance(pool.submit(utterances[1]).result(), Decoded)
    assert pid_of(pool) == before
    assert os.readlink(f"/proc/{before}/fd/2") == os.devnull  # nothing piles up in a file that nobody reads


def test_half_a_reply_is_never_taken_for_the_next_one(
    pool: DecodePool, utterances: list[Utterance], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = pool.submit(utterances[1]).result()

    def no_memory(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(decoders, "np", SimpleNamespace(empty=no_memory, float32=np.float32, uint8=np.uint8))
        with pytest.raises(MemoryError):
            pool.submit(utterances[0]).result()
    assert not pool._children
    found = pool.submit(utterances[1]).result()
    assert isinstance(found, Decoded)
    assert isinstance(expected, Decoded)
    assert np.array_equal(found.inputs, expected.inputs)


def test_abandoned_it_drops_what_is_queued_and_kills_what_is_at_work(
    pool: DecodePool, utterances: list[Utterance]
) -> None:
    pool.submit(utterances[0]).result()
    pid = pid_of(pool)
    os.kill(pid, signal.SIGSTOP)
    futures = [pool.submit(utterance) for utterance in utterances]
    wait_until(futures[0].running)
    pool.close(abandon=True)
    for future in [*futures, pool.submit(utterances[0])]:
        with pytest.raises(CancelledError):
            future.result(timeout=0)
    assert not Path(f"/proc/{pid}").exists()
    assert not any(thread.is_alive() for thread in pool._threads)


def test_closed_it_finishes_what_it_was_given(pool: DecodePool, utterances: list[Utterance]) -> None:
    futures = [pool.submit(utterance) for utterance in utterances]
    pool.close()
    assert all(isinstance(future.result(timeout=0), Decoded) for future in futures)
