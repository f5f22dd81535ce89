from __future__ import annotations

import threading
from concurrent.futures import Future
from types import SimpleNamespace

from sm_train.encoding.gate import Gate


def guest() -> SimpleNamespace:
    return SimpleNamespace(future=Future(), bytes=0)


def entered(gate: Gate, one: SimpleNamespace, size: int) -> threading.Thread:
    thread = threading.Thread(target=gate.enter, args=(one, size))
    thread.start()
    thread.join(0.2)
    return thread


def test_the_oldest_goes_on_and_others_wait_for_room() -> None:
    gate, first, second = Gate(10), guest(), guest()
    gate.enter(first, 8)
    gate.enter(first, 8)  # above the limit, but nobody is older
    waiting = entered(gate, second, 1)
    assert waiting.is_alive()
    gate.leave(first)
    waiting.join(10)
    assert not waiting.is_alive()
    assert (first.bytes, second.bytes) == (16, 1)


def test_one_that_fails_while_it_waits_takes_nothing_with_it() -> None:
    gate, first, second, third = Gate(10), guest(), guest(), guest()
    gate.enter(first, 10)
    waiting = entered(gate, second, 5)
    second.future.set_exception(RuntimeError())
    gate.leave(second)
    waiting.join(10)
    assert not waiting.is_alive()
    assert second.bytes == 0
    gate.enter(second, 5)  # it has failed: no room is taken
    gate.leave(first)
    gate.enter(third, 10)
    assert not entered(gate, guest(), 0).is_alive()
