"""Back-pressure: room in bytes for the units under way."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any, Protocol


class Guest(Protocol):
    """What takes room: a unit under way."""

    future: Future[Any]
    bytes: int


class Gate:
    """Room in bytes for what is under way; the oldest job is never kept waiting."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._used = limit_bytes, 0
        self._inside: list[Guest] = []
        self._changed = threading.Condition()

    def enter(self, job: Guest, size: int) -> None:
        """Wait for room, unless the job has failed meanwhile."""
        with self._changed:
            if job.future.done():
                return
            if job not in self._inside:
                self._inside.append(job)
            self._changed.wait_for(lambda: job not in self._inside or self._has_room(job, size))
            if job in self._inside:
                self._used += size
                job.bytes += size

    def leave(self, job: Guest) -> None:
        """Give back all that a job took."""
        with self._changed:
            if job in self._inside:
                self._inside.remove(job)
                self._used -= job.bytes
                self._changed.notify_all()

    def _has_room(self, job: Guest, size: int) -> bool:
        return self._used + size <= self._limit or self._inside[0] is job
