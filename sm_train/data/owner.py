"""One driver at a time: a lease on a set, kept alive while a driver is at work in it.

Leases are numbered files, ``.owner/000001.json`` and so on, each put if absent: of two drivers that take a number at
once, one gets it. The holder rewrites a small file beside its lease every few seconds. A driver that finds a lease
takes the next number at once if the holder was a process of this machine and has ended; else it waits for three
heartbeats, and leaves if there is one. So the highest number holds the set; a holder that finds its own lease gone,
changed or outnumbered has been taken for dead (it was stopped, or cut off from the storage) and leaves.

What holds: a folder on a POSIX file system, and S3 with conditional puts, never give a number twice. Elsewhere (see
:mod:`sm_train.data.bucket`) two that start at the same moment may both believe to have it; the one whose lease was
written over finds that at its next heartbeat or write. No storage can look at a lease within a write: a holder that is
stopped between its last look and the write of ``dataset.json`` writes it late. But all of a set follows from its
contract: what comes late, and what actors of an old driver still write, are the bytes that the new driver writes too.
Leases go when a driver leaves; those of a killed one stay, hidden, until the next run of its command.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from sm_train import files
from sm_train.data import processes, store
from sm_train.data.store import Guarded, Place, Store
from sm_train.errors import UserError

FOLDER = ".owner"
BEAT_S = 3.0
_MISSED = 3  # heartbeats, after which a holder is taken for dead
_SIGNAL = signal.SIGUSR2  # from the heartbeat's thread to the main one


@contextmanager
def hold(place: Place) -> Iterator[Store]:
    """Be the one driver of a set; what is written through the yielded store is written as its holder, or not at all.

    When another driver has taken over, the main thread, if it is the one that holds, is stopped where it stands.

    Raises:
        UserError: another driver is at work in the set; or, later, another one has taken over.
    """
    lease = _take(store.at(place))
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(_SIGNAL, lease.stop_here) if is_main else None
    try:
        lease.begin(wake=is_main)
        try:
            yield Guarded(lease.place, lease.require)
        finally:
            lease.end()
        lease.require()
    finally:
        with suppress(UserError, OSError):
            lease.give_up()
        if is_main:
            signal.signal(_SIGNAL, before or signal.SIG_DFL)


def is_left(place: Place) -> bool:
    """Whether a driver is at work in a set, or was killed there."""
    return store.at(place).exists(FOLDER)


class Lease:
    """A number in a set, and the thread that keeps it."""

    def __init__(self, place: Store, number: int, data: bytes) -> None:
        self.place, self.number, self._data = place, number, data
        self._lost = ""
        self._over = threading.Event()
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._keep, name="owner", daemon=True)
        self._wake = False

    def begin(self, wake: bool) -> None:
        """Start the heartbeat; ``wake`` says whether the main thread is to be stopped when the lease is lost."""
        self._wake = wake
        self._thread.start()

    def end(self) -> None:
        """End the heartbeat; the main thread is not stopped any more."""
        with self._ending:
            self._over.set()
        self._thread.join()

    def require(self) -> None:
        """Raise a UserError unless this is still the highest lease of the set."""
        if not self._lost:
            numbers = _numbers(self.place)
            if not numbers or numbers[-1] != self.number or _read(self.place, self.number) != self._data:
                by = _read(self.place, numbers[-1]) if numbers else None
                self._lost = (
                    f"{self.place.uri}: another driver has taken over{_named(by)}, as this one gave no sign of life "
                    f"for {_MISSED * BEAT_S:g} s; this one leaves the set to it"
                )
        if self._lost:
            raise UserError(self._lost)

    def stop_here(self, *_: object) -> None:
        """The handler of the signal, in the main thread; one that others sent means nothing."""
        if self._lost:
            raise UserError(self._lost)

    def give_up(self) -> None:
        """Remove every trace of leases, unless the set has another holder."""
        self.require()
        self.place.remove(FOLDER)

    def _keep(self) -> None:
        count = 0
        while not self._over.wait(BEAT_S if count else 0):
            try:
                if count:
                    self.require()
                count += 1
                self.place.write(_beat(self.number), str(count).encode())
            except (UserError, OSError):
                with self._ending:
                    if self._lost and self._wake and not self._over.is_set():
                        signal.pthread_kill(threading.main_thread().ident or 0, _SIGNAL)
                if self._lost:
                    return


def _take(place: Store) -> Lease:
    while True:
        numbers = _numbers(place)
        last = numbers[-1] if numbers else 0
        if last:
            _require_dead(place, last)
        facts = {
            "host": socket.gethostname(), "pid": os.getpid(), "process": processes.own(), "beat_s": BEAT_S,
            "began": datetime.now(UTC).isoformat(timespec="microseconds"), "command": shlex.join(sys.argv),
        }  # fmt: skip
        lease = Lease(place, last + 1, files.json_bytes(facts))
        with suppress(FileNotFoundError):  # the folder of leases was just removed
            if place.write_new(_lease(last + 1), lease._data):
                with suppress(UserError):
                    lease.require()
                    return lease
                raise UserError(f"{place.uri}: another driver started at the same moment; this one leaves it the set")


def _require_dead(place: Store, number: int) -> None:
    """Return once a lease's holder is gone: its process has ended, or it has missed its heartbeats.

    Raises:
        UserError: it is at work.
    """
    data = _read(place, number)
    facts = _facts(data)
    if data is None or processes.is_gone(str(facts.get("process", ""))):
        return
    first, end = _read_beat(place, number), time.monotonic() + _MISSED * float(facts.get("beat_s", BEAT_S))
    while time.monotonic() < end:
        time.sleep(float(facts.get("beat_s", BEAT_S)) / 4)
        if _read(place, number) is None:
            return
        if _read_beat(place, number) != first:
            raise UserError(
                f"{place.uri}: another driver is at work there{_named(data)}; wait for its end, or stop it (on its "
                "host: kill PID) and run this command again"
            )


def _numbers(place: Store) -> list[int]:
    names = [name.removesuffix(".json") for name in place.names(FOLDER) if name.endswith(".json")]
    return sorted(int(name) for name in names if name.isdigit())


def _read(place: Store, number: int) -> bytes | None:
    """A lease's bytes; None if it is gone."""
    return _bytes(place, _lease(number))


def _read_beat(place: Store, number: int) -> bytes | None:
    return _bytes(place, _beat(number))


def _bytes(place: Store, name: str) -> bytes | None:
    try:
        return place.read(name)
    except store.Absent:
        return None


def _facts(data: bytes | None) -> dict[str, Any]:
    try:
        facts = json.loads(data or b"{}")
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _named(data: bytes | None) -> str:
    facts = _facts(data)
    return f" (host {facts.get('host')}, pid {facts.get('pid')}, since {facts.get('began')})" if facts else ""


def _lease(number: int) -> str:
    return f"{FOLDER}/{number:06d}.json"


def _beat(number: int) -> str:
    return f"{FOLDER}/{number:06d}.beat"
