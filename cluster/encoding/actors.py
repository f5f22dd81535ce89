"""What runs in Ray's actors: an encoder that takes units, and decoders that serve it from other nodes."""

from __future__ import annotations

import itertools
import os
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from typing import Any

import numpy as np

from sm_train.encoding.decode import DecodeConfig
from sm_train.encoding.decoders import Decoded, DecodePool
from sm_train.encoding.settings import PrecomputeConfig
from sm_train.encoding.units import UnitEncoder
from sm_train.encoding.worker import make_encoder, this_worker
from sm_train.records import Quarantined, Receipt, Unit, Utterance

_CALL_UTTERANCES = 8  # at most so many go into one call
_PAUSE_S = 1.0  # before a decode actor that could not be reached is asked again

_Jobs = list[tuple[Utterance, Future[Decoded | Quarantined]]]


class EncodingActor:
    """One process that encodes units, several at a time: one is decoded while others are encoded and written."""

    def __init__(self, cfg: PrecomputeConfig, decode_actors: Sequence[Any] = ()) -> None:
        self.cfg, self.decode_actors = cfg, decode_actors
        self.encoder: UnitEncoder | None = None

    def ready(self) -> str:
        """Answers once this actor has a place in the cluster: host:pid."""
        return this_worker()

    def load(self) -> None:
        """Make the encoder: not at construction, so that a person's mistake comes back as itself."""
        import ray

        make = (lambda decoding: ActorDecoder(ray, self.decode_actors, decoding)) if self.decode_actors else None
        self.encoder = make_encoder(self.cfg, make)

    def encode(self, unit: Unit, is_probe: bool = False) -> Receipt:
        """Encode and commit one part, or only try to; safe to repeat."""
        assert self.encoder is not None
        return replace(self.encoder.submit(unit, is_probe).result(), worker=this_worker())


class DecodeActor:
    """One process on some node whose decoding processes serve encoders elsewhere."""

    def __init__(self, workers: int, timeout_s: float) -> None:
        self._workers, self._timeout_s = workers, timeout_s
        self._pool: DecodePool | None = None
        self._making = threading.Lock()

    def ready(self) -> None:
        """Answers once this actor has a place in the cluster."""

    def decode(self, decoding: DecodeConfig, utterances: Sequence[Utterance]) -> list[Decoded | Quarantined]:
        """Decode some utterances; all calls of a job name the same config."""
        with self._making:
            self._pool = self._pool or DecodePool(decoding, self._workers, self._timeout_s)
        return [future.result() for future in [self._pool.submit(utterance) for utterance in utterances]]


class ActorDecoder:
    """A decoder for an encoder, whose work is done by decode actors: the same bytes, through the object store.

    Utterances that were with an actor that died or cannot be reached are given to the next one; Ray starts it again.

    Args:
        ray: the module, or what stands for it.
        actors: handles of decode actors.
    """

    def __init__(self, ray: Any, actors: Sequence[Any], decoding: DecodeConfig) -> None:
        self._ray, self._decoding = ray, ray.put(decoding)
        first = os.getpid() % len(actors)  # not all encoders the same
        self._next = itertools.cycle([*actors[first:], *actors[:first]])
        self._todo: queue.SimpleQueue[tuple[Utterance, Future[Decoded | Quarantined]] | None] = queue.SimpleQueue()
        self._open: dict[Future[Decoded | Quarantined], None] = {}
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._send, name="decode-calls", daemon=True)
        self._thread.start()

    def submit(self, utterance: Utterance) -> Future[Decoded | Quarantined]:
        """Decode one utterance, or say why it cannot be used."""
        future: Future[Decoded | Quarantined] = Future()
        future.set_running_or_notify_cancel()
        with self._changed:
            self._open[future] = None
            if not self._is_closed:
                self._todo.put((utterance, future))
                return future
        self._answer(future, CancelledError("the decoder is closed"))
        return future

    def close(self, abandon: bool = False) -> None:
        """End once all is answered; or at once, what has no answer yet failing, whatever the actors go on with."""
        with self._changed:
            self._is_closed = True
            self._changed.wait_for(lambda: abandon or not self._open)
            left = list(self._open)
        for future in left:
            self._answer(future, CancelledError("the decoder was closed"))
        self._todo.put(None)
        self._thread.join()

    def _answer(self, future: Future[Decoded | Quarantined], found: Decoded | Quarantined | BaseException) -> None:
        """The first answer counts."""
        with self._changed:
            if future not in self._open:
                return
            del self._open[future]
            self._changed.notify_all()
        if isinstance(found, BaseException):
            future.set_exception(found)
        else:
            future.set_result(found)

    def _send(self) -> None:
        """Gather what is there into calls, and let each call's end answer its futures."""
        while job := self._todo.get():
            jobs, is_last = [job], False
            while len(jobs) < _CALL_UTTERANCES and not self._todo.empty():
                if (following := self._todo.get()) is None:
                    is_last = True
                    break
                jobs.append(following)
            if jobs := [job for job in jobs if not job[1].done()]:
                self._call(jobs)
            if is_last:
                return

    def _again(self, jobs: _Jobs) -> None:
        for job in jobs:
            self._todo.put(job)

    def _call(self, jobs: _Jobs) -> None:
        def answer(done: Future[list[Decoded | Quarantined]]) -> None:
            error = done.exception()
            if isinstance(error, self._ray.exceptions.RayTaskError):
                cause = getattr(error, "cause", None)
                for _, future in jobs:
                    self._answer(future, cause if isinstance(cause, Exception) else error)
            elif error is not None:
                again = threading.Timer(_PAUSE_S, self._again, (jobs,))
                again.daemon = True
                again.start()
            else:
                for (_, future), one in zip(jobs, done.result(), strict=True):
                    self._answer(future, _own(one))

        try:
            call = next(self._next).decode.remote(self._decoding, [utterance for utterance, _ in jobs])
            call.future().add_done_callback(answer)
        except Exception as error:  # as where this process has left its cluster
            for _, future in jobs:
                self._answer(future, error)


def _own(one: Decoded | Quarantined) -> Decoded | Quarantined:
    """A copy out of the object store, which is small."""
    return replace(one, inputs=np.array(one.inputs)) if isinstance(one, Decoded) else one
