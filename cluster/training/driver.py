"""The driver's part while ranks are at work on a Ray cluster: prints what they say, waits with them, and stops them."""

from __future__ import annotations

import math
import signal
import sys
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from cluster.places.ray_api import amounts
from cluster.training.desk import News
from cluster.training.node import GRACE_S
from cluster.training.ranks import how
from sm_train.errors import LOST, STOPPED, printable

if TYPE_CHECKING:
    from cluster.ray_train import RanksConfig

_TURN_S = 0.5
_SAY_S = 30.0  # of waiting for places, before it is said
_SAY_AGAIN_S = 120.0
_TAIL_BYTES, _TAIL_LINES = 4000, 20


class Stop:
    """Tells when this process has been asked to end: by SIGTERM, as of ``ray job stop``, or by ctrl-c."""

    def __init__(self) -> None:
        self.asked_at: float | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._came)

    def _came(self, number: int, frame: Any) -> None:
        self.asked_at = self.asked_at or time.monotonic()


class Driver:
    """Prints what rank 0 prints and what becomes of the others, and passes a stop on.

    Args:
        resources: what each node is to have free.
        desk: the handle of a :class:`~cluster.training.desk.Desk`.
    """

    def __init__(self, asked: RanksConfig, resources: dict[str, float], ray: Any, desk: Any, stop: Stop) -> None:
        self._asked, self._resources, self._ray, self._desk, self._stop = asked, resources, ray, desk, stop
        self._attempt, self._idle_since, self._said_at = 0, time.monotonic(), -math.inf
        self._is_told = False
        self._printed = b""
        self._ended: dict[int, tuple[int, str]] = {}

    def follow(self, fit: Future[Any]) -> int:
        """Stay until all is over; returns the code to end with."""
        from ray.train import WorkerGroupError

        while not fit.done():
            now = time.monotonic()
            if (asked_at := self._stop.asked_at) and not self._is_told:
                self._desk.stop.remote()
                self._is_told = True
                say(f"asked to stop: ranks have {self._asked.stop_s:g} s to save in")
            news = self._show()
            self._idle_since = now if news.is_running else self._idle_since
            if asked_at and now > max(self._idle_since, asked_at) + GRACE_S * 2:
                say("stopped while no rank was at work")
                return STOPPED
            if asked_at and now > asked_at + self._asked.stop_s + GRACE_S * 2:
                say("ranks that had not saved in time are left to be killed")
                return STOPPED
            self._say_what_is_missing(now)
            time.sleep(_TURN_S)
        self._show()
        self._say_who_ended()
        try:
            return int(fit.result().return_value)
        except WorkerGroupError as error:
            of_nodes = sorted(error.worker_failures.items())
            why = "; ".join(f"node {node}: {printable(str(one).strip().splitlines()[-1])}" for node, one in of_nodes)
            say(f"error: ranks were lost {self._attempt} times, max_restarts is {self._asked.max_restarts}; {why}")
            return STOPPED if self._is_told else LOST

    def _show(self) -> News:
        news: News = self._ray.get(self._desk.news.remote())
        sys.stdout.buffer.write(news.output)
        sys.stdout.flush()
        if news.attempt > self._attempt:
            self._say_who_ended()
            if self._attempt:
                say(f"start {news.attempt} of the ranks (max_restarts is {self._asked.max_restarts})")
            self._attempt, self._printed = news.attempt, b""
        self._printed = (self._printed + news.output)[-_TAIL_BYTES:]
        self._ended |= news.ended
        return news

    def _say_who_ended(self) -> None:
        """How ranks of the last attempt ended, and what they said, unless rank 0 has said the same."""
        for code in sorted({code for code, _ in self._ended.values()} - {STOPPED}):
            ranks = sorted(rank for rank, (other, _) in self._ended.items() if other == code)
            more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
            say(f"rank {', '.join(map(str, ranks[:8]))}{more}: {how(code)}")
            lines = self._ended[ranks[0]][1].splitlines() if code != LOST else []
            if lines and lines[-1].encode() not in self._printed:
                say("\n".join(f"rank {ranks[0]}: {printable(line)}" for line in lines[-_TAIL_LINES:]))
        self._ended = {}

    def _say_what_is_missing(self, now: float) -> None:
        """Say what is waited for, while ranks have no places."""
        if now < self._idle_since + _SAY_S or now < self._said_at + _SAY_AGAIN_S:
            return
        self._said_at = now
        alive = [amounts(node["Resources"]) for node in self._ray.nodes() if node["Alive"]]
        say(
            f"waiting for {self._asked.nodes} nodes with {amounts(self._resources)} free on each; the cluster has "
            f"{len(alive)} nodes ({'; '.join(sorted(alive))}), in all {amounts(self._ray.available_resources())} free"
        )


def say(text: str) -> None:
    """Print a line of the driver's own."""
    print(text, file=sys.stderr, flush=True)
