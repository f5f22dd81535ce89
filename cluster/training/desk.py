"""The desk: an actor beside the driver, where the nodes of a training say what has become of their ranks."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.training.ranks import final


@dataclass(frozen=True)
class Orders:
    """What a node is told."""

    stop: bool
    """Its ranks are to save and leave."""
    code: int | None
    """The run ends with this code; None while it does not."""
    all_ended: bool
    """Every rank of this attempt has ended."""


@dataclass(frozen=True)
class News:
    """What the driver is told."""

    attempt: int
    """Starts of the group of nodes so far."""
    is_running: bool
    """Every node of the newest has its ranks started, and not all of them have ended."""
    output: bytes
    """What rank 0 has printed since."""
    ended: dict[int, tuple[int, str]]
    """Ranks that have ended with another code than 0 since: code, and their last words."""


class Desk:
    """Keeps the words of nodes and driver for each other. Every call is short, and none waits.

    Args:
        ranks: W, the world size.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._is_stopping = False
        self._attempts: list[str] = []
        self._started: set[int] = set()
        self._codes: dict[int, int] = {}
        self._output = b""
        self._ended: dict[int, tuple[int, str]] = {}

    def begin(self, attempt: str, started: list[int]) -> bool:
        """A node's ranks are about to be started, in an attempt that all nodes name alike; whether not to."""
        if attempt not in self._attempts:
            self._attempts.append(attempt)
            self._started, self._codes = set(), {}
        self._started.update(started)
        return self._is_stopping

    def exchange(self, attempt: str, ended: dict[int, tuple[int, str]], output: bytes) -> Orders:
        """A node's news since it last called, for its orders.

        Args:
            ended: of its ranks, their codes and last words.
            output: of rank 0, where it is the node's.
        """
        self._output += output
        if attempt != self._attempts[-1]:  # a node that was given up, and does not know it yet
            return Orders(True, None, True)
        self._codes |= {rank: code for rank, (code, _) in ended.items()}
        self._ended |= {rank: said for rank, said in ended.items() if said[0]}
        return Orders(self._is_stopping, final(self._codes), len(self._codes) == self._ranks)

    def stop(self) -> None:
        """Have all ranks save and leave."""
        self._is_stopping = True

    def news(self) -> News:
        """What has come since this was last asked."""
        is_running = len(self._started) == self._ranks and len(self._codes) < self._ranks
        said = News(len(self._attempts), is_running, self._output, self._ended)
        self._output, self._ended = b"", {}
        return said
