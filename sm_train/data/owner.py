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

Shares of a set are held likewise, each by a lease of its own below ``.owner-shares``: beside each other, never beside
the one driver of the set. Either kind writes its lease first and then looks for the other, so of two that start at once
at least one sees the other, and leaves. Who finds the other kind's leases dead removes them, which stops a holder that
wakes up later.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from sm_train import files
from sm_train.data import leases, processes, store
from sm_train.data.store import Guarded, Place, Store
from sm_train.errors import UserError

FOLDER, SHARES = leases.FOLDER, leases.SHARES
BEAT_S = 3.0
_SIGNAL = signal.SIGUSR2  # from the heartbeat's thread to the main one


@contextmanager
def hold(place: Place, share: str = "") -> Iterator[Store]:
    """Be the one driver of a set; what is written through the yielded store is written as its holder, or not at all.

    When another driver has taken over, the main thread, if it is the one that holds, is stopped where it stands.

    Args:
        share: hold this share, as "0/3", beside the holders of others.

    Raises:
        UserError: another driver is at work in the set, or one of its shares, or in the same share; or, later, another
            one has taken over.
    """
    lease = _take_share(store.at(place), share) if share else _take_set(store.at(place))
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(_SIGNAL, lease.stop_here) if is_main else None
    try:
        lease.wakes_main = is_main
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
    return any(store.at(place).exists(folder) for folder in (FOLDER, SHARES))


class Lease:
    """A number in a folder of leases, and the thread that keeps it."""

    def __init__(self, place: Store, folder: str, number: int, data: bytes) -> None:
        self.place, self.folder, self.number, self._data = place, folder, number, data
        self._lost = ""
        self._over = threading.Event()
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._keep, name="owner", daemon=True)
        self.wakes_main = False
        """Whether the main thread is to be stopped when the lease is lost."""

    def begin(self) -> None:
        """Start the heartbeat."""
        self._thread.start()

    def end(self) -> None:
        """End the heartbeat; the main thread is not stopped any more."""
        with self._ending:
            self._over.set()
        self._thread.join()

    def require(self) -> None:
        """Raise a UserError unless this is still the highest lease of its folder."""
        if not self._lost:
            numbers = leases.numbers(self.place, self.folder)
            own = leases.read(self.place, self.folder, self.number)
            if not numbers or numbers[-1] != self.number or own != self._data:
                by = leases.read(self.place, self.folder, numbers[-1]) if numbers else None
                self._lost = (
                    f"{self.place.uri}: another driver has taken over{leases.named(by)}, as this one gave no sign of "
                    f"life for {leases.MISSED * BEAT_S:g} s; this one leaves the set to it"
                )
        if self._lost:
            raise UserError(self._lost)

    def stop_here(self, *_: object) -> None:
        """The handler of the signal, in the main thread; one that others sent means nothing."""
        if self._lost:
            raise UserError(self._lost)

    def give_up(self) -> None:
        """Remove every trace of leases in the folder, unless there is another holder."""
        self.require()
        self.place.remove(self.folder)

    def _keep(self) -> None:
        count = 0
        while not self._over.wait(BEAT_S if count else 0):
            try:
                if count:
                    self.require()
                count += 1
                self.place.write(leases.beat(self.folder, self.number), str(count).encode())
            except (UserError, OSError):
                with self._ending:
                    if self._lost and self.wakes_main and not self._over.is_set():
                        signal.pthread_kill(threading.main_thread().ident or 0, _SIGNAL)
                if self._lost:
                    return


def _take_set(place: Store) -> Lease:
    dead = _refuse_living(place, leases.shares(place))
    lease = _take(place, FOLDER)
    try:
        _refuse_living(place, leases.shares(place) - dead)
        if place.exists(SHARES):
            place.remove(SHARES)
    except BaseException:
        lease.end()
        with suppress(UserError, OSError):
            lease.give_up()
        raise
    return lease


def _take_share(place: Store, share: str) -> Lease:
    dead = _refuse_living(place, leases.last(place, FOLDER))
    lease = _take(place, leases.of_share(share))
    try:
        _refuse_living(place, leases.last(place, FOLDER) - dead)
        if dead:
            with suppress(FileNotFoundError):  # another share was faster
                place.remove(FOLDER)
    except BaseException:
        lease.end()
        with suppress(UserError, OSError):
            lease.give_up()
        raise
    return lease


def _take(place: Store, folder: str) -> Lease:
    while True:
        last = max((number for _, number in _refuse_living(place, leases.last(place, folder))), default=0)
        facts = {
            "host": socket.gethostname(), "pid": os.getpid(), "process": processes.own(), "beat_s": BEAT_S,
            "began": datetime.now(UTC).isoformat(timespec="microseconds"), "command": shlex.join(sys.argv),
        }  # fmt: skip
        lease = Lease(place, folder, last + 1, files.json_bytes(facts))
        with suppress(FileNotFoundError):  # the folder of leases was just removed
            if place.write_new(leases.file(folder, last + 1), lease._data):
                with suppress(UserError):
                    lease.require()
                    lease.begin()  # whoever started at the same moment looks for a sign of life
                    return lease
                raise UserError(
                    f"{place.uri}: {leases.holder(folder)} started at the same moment; this one leaves it the set"
                )


def _refuse_living(place: Store, some: leases.Leases) -> leases.Leases:
    return leases.refuse_living(place, some, BEAT_S)
