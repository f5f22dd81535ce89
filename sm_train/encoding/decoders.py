"""Decoding processes, seen from the encoder's: a file that ends one costs that process, and one row.

Shape letters: T frames, F inputs of a frame.
"""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import CancelledError, Future
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sm_train.encoding.decode import DecodeConfig
from sm_train.errors import UserError
from sm_train.records import Quarantined, Utterance

_TRIES = 2
_START_S = 120.0


@dataclass(frozen=True)
class Decoded:
    """One utterance, ready for the encoder."""

    inputs: NDArray[np.float32]
    num_samples: int


class Decoder(Protocol):
    """What makes utterances ready for the encoder, ahead of it."""

    def submit(self, utterance: Utterance) -> Future[Decoded | Quarantined]:
        """Decode one utterance, or say why it cannot be used."""

    def close(self, abandon: bool = False) -> None:
        """Finish what was given, and end.

        Args:
            abandon: end at once; every future that has no answer yet is cancelled or fails with a CancelledError, as
                those of what is submitted later do.
        """


class DecodePool:
    """Decoding processes, which are started when first needed.

    Args:
        workers: how many.
        timeout_s: after which a process that is still at one utterance is ended, as if it had crashed.
    """

    def __init__(self, cfg: DecodeConfig, workers: int, timeout_s: float) -> None:
        self._cfg, self._timeout_s = cfg, timeout_s
        self._todo: queue.SimpleQueue[tuple[Utterance, Future[Decoded | Quarantined]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_closed = self._is_abandoned = False
        self._children: dict[int, _Child] = {}  # by worker
        self._threads = [
            threading.Thread(target=self._work, args=(i,), name=f"decode-{i}", daemon=True) for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, utterance: Utterance) -> Future[Decoded | Quarantined]:
        """Decode one utterance, or say why it cannot be used."""
        future: Future[Decoded | Quarantined] = Future()
        with self._lock:
            if self._is_closed:
                future.set_exception(CancelledError("the decoder is closed"))
            else:
                self._todo.put((utterance, future))
        return future

    def close(self, abandon: bool = False) -> None:
        """End the processes once they have done what they were given, or at once."""
        with self._lock:
            self._is_closed = True
            self._is_abandoned |= abandon
            for child in self._children.values() if abandon else ():
                child.kill()
        for _ in self._threads:
            self._todo.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self, worker: int) -> None:
        while job := self._todo.get():
            utterance, future = job
            if self._is_abandoned:
                future.cancel()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._decode(worker, utterance))
            except BaseException as error:
                future.set_exception(error)
        self._forget(worker)

    def _decode(self, worker: int, utterance: Utterance) -> Decoded | Quarantined:
        crashes: list[_Crashed] = []
        while len(crashes) < _TRIES:
            try:
                return self._child(worker).decode(utterance, self._timeout_s)
            except UserError:  # which a whole reply said
                raise
            except BaseException as error:
                self._forget(worker, kill=True)  # or the rest of its reply would be taken for the next one
                if self._is_abandoned:
                    raise CancelledError("the decoder was closed") from None
                if not isinstance(error, _Crashed):
                    raise
                crashes.append(error)
        return Quarantined(utterance.id, crashes[-1].reason, f"the decoder {crashes[-1]}, {_TRIES} times")

    def _child(self, worker: int) -> _Child:
        if child := self._children.get(worker):
            return child
        with self._lock:
            if self._is_abandoned:
                raise CancelledError
            child = self._children[worker] = _Child()
        child.start(self._cfg)
        return child

    def _forget(self, worker: int, kill: bool = False) -> None:
        with self._lock:
            child = self._children.pop(worker, None)
        if child and kill:
            child.kill()
        if child:
            child.end()


class _Crashed(Exception):
    """A decoding process is gone."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class _Child:
    """One decoding process, seen from the encoder's; the thread that makes it must live as long."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  its life is the child's
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sm_train.encoding.decode", str(os.getpid())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, bufsize=0,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        self._poll = select.poll()
        self._poll.register(self._replies, select.POLLIN)

    def start(self, cfg: DecodeConfig) -> None:
        """Tell it of the job.

        Raises:
            RuntimeError: it ended, with what it said.
        """
        try:
            self._ask(asdict(cfg), _START_S)
        except _Crashed as crash:
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace")
            raise RuntimeError(f"a decoding process {crash} at its start:\n{said}") from None
        self._errors.close()

    def decode(self, utterance: Utterance, timeout_s: float) -> Decoded | Quarantined:
        """What it makes of an utterance.

        Raises:
            _Crashed: it is gone, or was ended for taking too long.
            UserError: what stops the whole job, as an unreachable storage does.
        """
        reply = self._ask(asdict(utterance), timeout_s)
        if "reason" in reply:
            return Quarantined(utterance.id, reply["reason"], reply["detail"])
        if "mistake" in reply:
            raise UserError(reply["mistake"])
        values = np.empty(reply["shape"], np.float32)
        self._read_into(
            values.reshape(-1).view(np.uint8).data if values.size else memoryview(b""), time.monotonic() + timeout_s
        )
        return Decoded(values, reply["num_samples"])

    def _ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        until = time.monotonic() + timeout_s
        try:
            self._requests.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            self._gone()
        head = bytearray(4)
        self._read_into(memoryview(head), until)
        body = bytearray(int.from_bytes(head, "little"))
        self._read_into(memoryview(body), until)
        reply: dict[str, Any] = json.loads(bytes(body))
        return reply

    def _read_into(self, out: memoryview, until: float) -> None:
        while len(out):
            if not self._poll.poll(1000 * max(until - time.monotonic(), 0)):
                self._process.kill()
                self._process.wait()
                raise _Crashed("times_out", "took too long and was ended")
            count = os.readv(self._replies.fileno(), [out])
            if count == 0:
                self._gone()
            out = out[count:]

    def _gone(self) -> None:
        code = self._process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        raise _Crashed("crashes_decoder", how)

    def kill(self) -> None:
        """End it now, from any thread."""
        self._process.kill()

    def end(self) -> None:
        """Let it go: at the end of its input it leaves."""
        self._requests.close()
        self._process.wait()
        self._replies.close()
        self._errors.close()
