"""Watches the ranks of a run: where one dies, stops, hangs or leaves, all others leave within a bounded time.

Every rank has one daemon thread. Ranks 1, 2, ... hold a connection to rank 0 and send it pulses: how many marks of
progress they have made and what they are doing. Rank 0 judges them and sends its verdict to all. A process that dies
closes its connection, so a death is seen at once; silence or lack of progress by the clock. Plain sockets: a TCPStore's
calls wait without bound for a server that is stopped, and it prints C++ stack traces when a peer goes.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist

from sm_train.errors import LOST, MISTAKEN, UserError
from sm_train.train.engines.pulse import Centre, Spoke, connect, listen
from sm_train.train.engines.verdict import Verdict

MISTAKE = "a mistake: "
"""How the last word of a rank begins that leaves with a person's mistake: the others leave as it does."""
GRACE_S = 3.0
"""Seconds that a rank's own error is waited for, where another has left with one: it may well be the same."""


class Watch:
    """A rank's part in the watch, and a context manager around whatever may fail: ``with engine.watch: ...``.

    An error that leaves the context is told to the other ranks, which then leave with code ``LOST`` and name it. Where
    it comes from a collective, the rank that broke it is waited for and named instead, and this rank leaves with
    ``LOST`` too. For one rank, before ``start`` and after ``close`` it does nothing.
    """

    def __init__(self, rank: int, world_size: int, heartbeat_s: float, timeout_s: float) -> None:
        self.rank, self.world_size = rank, world_size
        self.heartbeat_s, self.timeout_s = heartbeat_s, timeout_s
        self.marks, self.doing = 0, "start"
        self._thread: threading.Thread | None = None
        self._deciding = threading.Lock()  # whoever has it decides how this process ends
        self._is_ending = False
        self._last_word: str | None = None
        self._gave_up = threading.Event()
        self.on_leave: Callable[[str], object] = lambda why: None
        """Called when another rank makes this one leave, before the process ends."""

    def mark(self, doing: str) -> None:
        """Count one more piece of progress; every rank must make the same marks in the same order."""
        self.marks += 1
        self.doing = doing

    def start(self, device: torch.device) -> None:
        """Begin to watch; every rank must call it.

        Raises:
            UserError: rank 0 cannot be reached.
        """
        if self.world_size == 1 or self.heartbeat_s == 0:
            return
        limits = (self.heartbeat_s, self.timeout_s)
        centre = listen(self.world_size, *limits) if self.rank == 0 else None
        place = torch.tensor(centre.place if centre else (0, 0), dtype=torch.int64, device=device)
        dist.all_reduce(place)  # no broadcast: rank 0 counts from here, and all must be here
        port, token = place.tolist()
        if centre:
            centre.begin()
        self._end: Centre | Spoke = centre or connect(self.rank, port, token, self.heartbeat_s)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the watch; to be called once all ranks have met for the last time."""
        self._finish(None)

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or self._thread is None:
            return
        if is_collective(error):  # this process ends in the thread, if some rank is to blame
            self._gave_up.set()
            self._thread.join(self.heartbeat_s + 3)
        words, name = " ".join(str(error).split())[:300], type(error).__name__
        self._finish(f"{MISTAKE}{words}" if isinstance(error, UserError) else f"{name}: {words}" if words else name)

    def _finish(self, last_word: str | None) -> None:
        with self._deciding:
            self._is_ending, self._last_word = True, last_word
        self._gave_up.set()
        if self._thread is not None:
            self._thread.join(2 * GRACE_S)
            self._thread = None

    def _run(self) -> None:
        while not self._is_ending:
            verdict = self._end.turn(self.marks, self.doing)
            if verdict is not None:
                self._leave(verdict)
                return
        self._end.finish(self._last_word)

    def _leave(self, verdict: Verdict) -> None:
        """End this process, unless it has an error of its own to report."""
        if isinstance(self._end, Centre):
            self._end.announce(verdict)
        if verdict.is_last_word:
            self._gave_up.wait(GRACE_S)
        with self._deciding:
            if self._is_ending:
                return
            is_mistake = verdict.is_last_word and f"left: {MISTAKE}" in verdict.text
            where = f"rank {self.rank} leaves at mark {self.marks} ({self.doing}), in {_standing()}"
            remedy = "" if is_mistake else "; the same command goes on from the last checkpoint"
            # Straight to the descriptor: sys.stderr may be locked by a main thread that hangs.
            os.write(2, f"error: {verdict.text}; {where}{remedy}\n".encode())
            with suppress(Exception):
                self.on_leave(verdict.text)
            if isinstance(self._end, Centre):
                self._end.linger()
            os._exit(MISTAKEN if is_mistake else LOST)


def is_collective(error: BaseException) -> bool:
    """Whether an error came out of torch.distributed: gloo raises plain RuntimeErrors, so the place counts."""
    if isinstance(error, dist.DistError):
        return True
    home = str(Path(dist.__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, RuntimeError) and any(frame.filename.startswith(home) for frame in frames)


def _standing() -> str:
    """Where the main thread is."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "no frame"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
