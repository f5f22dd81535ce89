"""What ranks tell each other beside their collectives: pulses to rank 0, its verdict to all. JSON lines over TCP."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import time
from typing import Any

from sm_train.errors import UserError
from sm_train.train.engines.verdict import Member, Verdict, judge

TURN_S = 0.1
"""Seconds that a turn waits for news at most."""
_FAREWELL_S = 2.0
_LONGEST_LINE = 1 << 16


class Link:
    """One connection: lines of JSON, nothing of it ever waits."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.connection.setblocking(False)
        self.rank: int | None = None
        self._rest = b""

    def send(self, **message: Any) -> None:
        """Send a message; that the other end is gone is found when it is read from."""
        with contextlib.suppress(OSError):
            self.connection.send(json.dumps(message).encode() + b"\n")

    def receive(self) -> tuple[list[dict[str, Any]], bool]:
        """What has come so far, and whether more can come."""
        try:
            chunk = self.connection.recv(_LONGEST_LINE)
        except BlockingIOError:
            return [], True
        except OSError:
            return [], False
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        try:
            messages = [dict(json.loads(line)) for line in lines]
        except (ValueError, TypeError, RecursionError):  # no rank of ours
            return [], False
        return messages, bool(chunk) and len(self._rest) < _LONGEST_LINE


class Centre:
    """Rank 0's end: it hears all ranks and judges."""

    def __init__(self, listener: socket.socket, world_size: int, heartbeat_s: float, timeout_s: float) -> None:
        self.listener = listener
        self.listener.setblocking(False)
        self.limits = (heartbeat_s, timeout_s)
        self.beat_s, self.next_beat_s = _beat_s(heartbeat_s), 0.0
        self.place = (int(listener.getsockname()[1]), secrets.randbits(62))
        self.members = [Member(rank, 0.0, 0.0) for rank in range(world_size)]
        self.members[0].place = _own_place()
        self.selector = selectors.DefaultSelector()
        self.selector.register(listener, selectors.EVENT_READ)

    def begin(self) -> None:
        """All ranks have met: silence counts from here."""
        for member in self.members:
            member.heard_s = member.moved_s = time.monotonic()

    @property
    def links(self) -> list[Link]:
        """The connections of ranks."""
        found = (key.data for key in self.selector.get_map().values())
        return [link for link in found if link is not None and link.rank is not None]

    def turn(self, marks: int, doing: str) -> Verdict | None:
        """Hear all ranks, then judge."""
        self._hear()
        now_s = time.monotonic()
        self.members[0].hear(now_s, marks, doing)
        if now_s >= self.next_beat_s:
            self.next_beat_s = now_s + self.beat_s
            for link in self.links:
                link.send(beat=True)
        return judge(self.members, now_s, *self.limits)

    def announce(self, verdict: Verdict) -> None:
        """Tell all ranks why they must leave."""
        for link in self.links:
            link.send(verdict=verdict.text, is_last_word=verdict.is_last_word)

    def linger(self) -> None:
        """Hear what is under way: a connection that is closed with something unread may take along what was sent."""
        for _ in range(2):
            self._hear()

    def finish(self, last_word: str | None) -> None:
        """Tell all ranks that this one leaves, and hear them out."""
        if last_word is not None:
            self.announce(Verdict(f"{self.members[0]} left: {last_word}", is_last_word=True))
            self.linger()
            return
        for link in self.links:
            link.send(done=True)
        until_s = time.monotonic() + _FAREWELL_S
        while time.monotonic() < until_s and not all(m.is_done or m.is_gone for m in self.members[1:]):
            self._hear()
        for link in self.links:
            link.connection.close()
        self.listener.close()

    def _hear(self) -> None:
        for key, _ in self.selector.select(TURN_S):
            if key.data is None:
                with contextlib.suppress(OSError):  # it has gone again
                    connection, _ = self.listener.accept()
                    self.selector.register(connection, selectors.EVENT_READ, Link(connection))
            else:
                self._read(key.data)

    def _read(self, link: Link) -> None:
        messages, is_open = link.receive()
        for message in messages:
            if message.get("token") == self.place[1]:
                link.rank = int(message["rank"])
                self.members[link.rank].place = str(message["place"])
                link.send(place=self.members[0].place)
            if link.rank is None:  # a stranger
                is_open = False
                break
            member = self.members[link.rank]
            member.hear(time.monotonic(), int(message.get("marks", member.marks)), str(message.get("doing", "")))
            member.is_done |= "done" in message
            member.last_word = message.get("left", member.last_word)
        if link.rank is not None and not is_open:
            self.members[link.rank].is_gone = True
        if not is_open or (link.rank is not None and self.members[link.rank].is_done):
            self.selector.unregister(link.connection)
            link.connection.close()


class Spoke:
    """Another rank's end: it sends pulses and hears the verdict."""

    def __init__(self, link: Link, heartbeat_s: float) -> None:
        self.link, self.heartbeat_s = link, heartbeat_s
        self.beat_s, self.next_beat_s = _beat_s(heartbeat_s), 0.0
        self.heard_s = time.monotonic()
        self.is_over = False
        self.selector = selectors.DefaultSelector()
        self.selector.register(link.connection, selectors.EVENT_READ)
        self.centre = Member(0, 0.0, 0.0)

    def turn(self, marks: int, doing: str) -> Verdict | None:
        """Send a pulse where one is due, and hear rank 0."""
        if time.monotonic() >= self.next_beat_s:
            self.next_beat_s = time.monotonic() + self.beat_s
            self.link.send(marks=marks, doing=doing)
        messages, is_open = self._hear()
        now_s = time.monotonic()
        for message in messages:
            self.heard_s = now_s
            self.centre.place = message.get("place", self.centre.place)
            self.is_over |= "done" in message
            if "verdict" in message:
                return Verdict(message["verdict"], bool(message["is_last_word"]))
        if self.is_over:
            time.sleep(TURN_S)
            return None
        if not is_open:
            return Verdict(f"{self.centre} is gone: its process ended without a word")
        if now_s - self.heard_s > self.heartbeat_s:
            return Verdict(f"{self.centre} has not been heard from for {self.heartbeat_s:g} s")
        return None

    def finish(self, last_word: str | None) -> None:
        """Tell rank 0 that this one leaves; it answers by closing the connection."""
        self.link.send(**({"done": True} if last_word is None else {"left": last_word}))
        until_s = time.monotonic() + (_FAREWELL_S if last_word is None else 2 * TURN_S)
        while time.monotonic() < until_s and self._hear()[1]:
            pass
        self.link.connection.close()

    def _hear(self) -> tuple[list[dict[str, Any]], bool]:
        self.selector.select(TURN_S)
        return self.link.receive()


def listen(world_size: int, heartbeat_s: float, timeout_s: float) -> Centre:
    """Rank 0's end, on a free port."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    listener = socket.create_server(("", 0), family=family, backlog=max(128, world_size), dualstack_ipv6=both)
    return Centre(listener, world_size, heartbeat_s, timeout_s)


def connect(rank: int, port: int, token: int, heartbeat_s: float) -> Spoke:
    """Another rank's end.

    Raises:
        UserError: rank 0 cannot be reached.
    """
    host = os.environ["MASTER_ADDR"]
    try:
        link = Link(socket.create_connection((host, port), timeout=heartbeat_s))
    except OSError as error:
        raise UserError(
            f"rank {rank} cannot reach rank 0 at {host}, port {port} ({error}); open the ports between the nodes, or "
            "set engine.heartbeat_s=0 to train without the watch"
        ) from None
    link.send(token=token, rank=rank, place=_own_place())
    return Spoke(link, heartbeat_s)


def _own_place() -> str:
    return f"host {socket.gethostname()}, pid {os.getpid()}"


def _beat_s(heartbeat_s: float) -> float:
    return min(1.0, heartbeat_s / 4)
