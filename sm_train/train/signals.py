"""Signals that ask a run to save and leave: SIGTERM (schedulers, torchrun), SIGUSR1 (a warning before a time limit),
SIGHUP (a terminal that closed) unless it is ignored."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StopRequest:
    """While entered, remembers which signal came instead of ending the process.

    Only the main thread can receive signals: elsewhere nothing changes.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        """The first signal that came, as SIGTERM."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            wanted = [n for n in _SIGNALS if signal.getsignal(n) != signal.SIG_IGN]  # as nohup does
            self._before = {number: signal.signal(number, self._came) for number in wanted}
        return self

    def _came(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:  # the process is about to end: a launcher that ends it sooner must not hide why
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
