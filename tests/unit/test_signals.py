"""Signals: remembered while training, as they were before and after."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from sm_train.train.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_remembered_and_the_first_one_counts(number: signal.Signals) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)}
    with StopRequest() as request:
        assert request.name is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.name == number.name
    assert {n: signal.getsignal(n) for n in before} == before


def test_outside_the_main_thread_nothing_changes() -> None:
    found: list[object] = []

    def work() -> None:
        with StopRequest() as request:
            found.append((request.name, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(None, signal.getsignal(signal.SIGTERM))]
