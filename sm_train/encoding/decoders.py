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
from concurrent.futures import Future
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

    def close(self) -> None:
        """Finish what was given, and end."""


class DecodePool:
    """Decoding processes, which are started when first needed.

    Args:
        workers: how many.
        timeout_s: after which a process that is still at one utterance is ended, as if it had crashed.
    """

    def __init__(self, cfg: DecodeConfig, workers: int, timeout_s: float) -> None:
        self._cfg, self._timeout_s = cfg, timeout_s
        self._todo: queue.SimpleQueue[tuple[Utterance, Future[Decoded | Quarantined]] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name=f"decode-{i}", daemon=True) for i in range(workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, utterance: Utterance) -> Future[Decoded | Quarantined]:
        """Decode one utterance, or say why it cannot be used."""
        future: Future[Decoded | Quarantined] = Future()
        self._todo.put((utterance, future))
        return future

    def close(self) -> None:
        """End the processes once they have done what they were given."""
        for _ in self._threads:
            self._todo.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        child: _Child | None = None
        while job := self._todo.get():
            utterance, future = job
            try:
                for attempt in range(_TRIES):
                    child = child or _Child(self._cfg)
                    try:
                        future.set_result(child.decode(utterance, self._timeout_s))
                        break
                    except _Crashed as crash:
                        child = None
                        if attempt + 1 == _TRIES:
                            detail = f"the decoder {crash}, {_TRIES} times"
                            future.set_result(Quarantined(utterance.id, crash.reason, detail))
            except Exception as error:
                future.set_exception(error)
        if child:
            child.end()


class _Crashed(Exception):
    """A decoding process is gone."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class _Child:
    """One decoding process, seen from the encoder's."""

    def __init__(self, cfg: DecodeConfig) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  its life is the child's
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sm_train.encoding.decode"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, bufsize=0,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        self._poll = select.poll()
        self._poll.register(self._replies, select.POLLIN)
        try:
            self._ask(asdict(cfg), _START_S)
        except _Crashed as crash:
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace")
            raise RuntimeError(f"a decoding process {crash} at its start:\n{said}") from None

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
        if "bug" in reply:
            raise RuntimeError(f"a decoding process failed at {utterance.id!r}:\n{reply['bug']}")
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

    def end(self) -> None:
        """Let it go: at the end of its input it leaves."""
        self._requests.close()
        self._process.wait()
        self._replies.close()
        self._errors.close()
