"""Decoding by actors elsewhere, against actors that fail on command."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.encoding import actors
from cluster.encoding.actors import ActorDecoder
from sm_train.encoding.decode import DecodeConfig
from sm_train.encoding.decoders import Decoded
from sm_train.errors import UserError
from sm_train.records import Quarantined, Utterance

DECODING = DecodeConfig("/corpus", 60.0, -80.0, 400, None, None)


class RayTaskError(Exception):
    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class ActorDiedError(Exception):
    pass


RAY = SimpleNamespace(put=lambda value: value, exceptions=SimpleNamespace(RayTaskError=RayTaskError))


class Actor:
    """Answers calls at once, or fails them for as long as ``errors`` holds something."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.calls = list(errors), list[list[str]]()
        self.decode = SimpleNamespace(remote=self.call)
        self.is_silent, self.silent = False, list[Future[Any]]()

    def call(self, decoding: DecodeConfig, utterances: Sequence[Utterance]) -> Any:
        assert decoding == DECODING
        self.calls.append([u.id for u in utterances])
        future: Future[Any] = Future()
        if self.is_silent:
            self.silent.append(future)
        elif self.errors:
            future.set_exception(self.errors.pop())
        else:
            future.set_result([one(u) for u in utterances])
        return SimpleNamespace(future=lambda: future)


def one(utterance: Utterance) -> Decoded | Quarantined:
    if utterance.id == "bad":
        return Quarantined("bad", "silent", "nothing")
    values = np.full(3, int(utterance.id), np.float32)
    values.flags.writeable = False  # as what lies in the object store is
    return Decoded(values, 3)


def ask(name: str) -> Utterance:
    return Utterance(name, "", 0, 1, "", "", "", "")


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ActorDecoder]:
    monkeypatch.setattr(actors, "_PAUSE_S", 0.01)
    return lambda *some: ActorDecoder(RAY, some, DECODING)


def test_each_utterance_gets_its_own_answer_whoever_decodes_it(make: Callable[..., ActorDecoder]) -> None:
    decoder = make(Actor(), Actor())
    futures = [decoder.submit(ask(name)) for name in ["3", "bad", *map(str, range(40))]]
    answers = [future.result(timeout=10) for future in futures]
    assert isinstance(answers[1], Quarantined)
    assert [int(a.inputs[0]) for a in answers if isinstance(a, Decoded)] == [3, *range(40)]
    assert all(a.inputs.flags.writeable for a in answers if isinstance(a, Decoded))
    decoder.close()


def test_calls_carry_few_utterances(make: Callable[..., ActorDecoder]) -> None:
    actor = Actor()
    decoder = make(actor)
    for future in [decoder.submit(ask(str(i))) for i in range(50)]:
        future.result(timeout=10)
    assert max(map(len, actor.calls)) <= 8
    decoder.close()


def test_those_of_a_dead_actor_are_asked_again(make: Callable[..., ActorDecoder]) -> None:
    for pool in [(Actor(ActorDiedError(), ActorDiedError()),), (Actor(ActorDiedError()), Actor())]:
        decoder = make(*pool)
        futures = [decoder.submit(ask(str(i))) for i in range(20)]
        assert [int(future.result(timeout=10).inputs[0]) for future in futures] == list(range(20))
        assert not any(actor.errors for actor in pool)
        decoder.close()


def test_a_mistake_and_a_bug_reach_whoever_asked(make: Callable[..., ActorDecoder]) -> None:
    decoder = make(Actor(RayTaskError(UserError("no bucket"))))
    with pytest.raises(UserError, match="no bucket"):
        decoder.submit(ask("1")).result(timeout=10)
    decoder.close()


def test_a_close_waits_for_every_answer_those_asked_again_too(make: Callable[..., ActorDecoder]) -> None:
    decoder = make(Actor(ActorDiedError(), ActorDiedError()))
    futures = [decoder.submit(ask(str(i))) for i in range(20)]
    decoder.close()
    assert [int(future.result(timeout=0).inputs[0]) for future in futures] == list(range(20))
    with pytest.raises(CancelledError):
        decoder.submit(ask("1")).result(timeout=0)


def test_abandoned_everything_fails_at_once_and_late_answers_are_let_be(make: Callable[..., ActorDecoder]) -> None:
    actor = Actor()
    actor.is_silent = True
    decoder = make(actor)
    futures = [decoder.submit(ask(str(i))) for i in range(20)]
    decoder.close(abandon=True)
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(timeout=0)
    for call, names in zip(actor.silent, actor.calls, strict=True):
        call.set_result([one(ask(name)) for name in names])


def test_a_call_that_cannot_be_made_fails_its_utterances(make: Callable[..., ActorDecoder]) -> None:
    actor = Actor()
    actor.decode = SimpleNamespace(remote=lambda *_: 1 / 0)
    decoder = make(actor)
    for future in [decoder.submit(ask(str(i))) for i in range(10)]:
        with pytest.raises(ZeroDivisionError):
            future.result(timeout=10)
    decoder.close()
