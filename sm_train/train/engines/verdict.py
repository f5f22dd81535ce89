"""Which rank is to blame, by what rank 0 has heard: pure, no clock and no connection."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """Why all ranks must leave."""

    text: str
    is_last_word: bool = False
    """A rank has left with an error of its own, which others may have too."""


@dataclass
class Member:
    """What rank 0 knows of a rank; times are of its own monotonic clock."""

    rank: int
    heard_s: float
    moved_s: float
    """When its marks were last seen to grow."""
    place: str = ""
    marks: int = 0
    doing: str = "start"
    is_done: bool = False
    is_gone: bool = False
    last_word: str | None = None

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.place})" if self.place else f"rank {self.rank}"

    def hear(self, now_s: float, marks: int, doing: str) -> None:
        """Take a pulse."""
        self.heard_s = now_s
        if marks != self.marks:
            self.marks, self.doing, self.moved_s = marks, doing, now_s


def judge(members: Collection[Member], now_s: float, heartbeat_s: float, timeout_s: float) -> Verdict | None:
    """The rank to blame, if there is one: that left, died, is silent or hangs, in this order.

    A rank hangs where some rank has made no mark for ``timeout_s``; it is the one with the fewest marks, as the others
    wait for it.
    """
    at_work = [m for m in members if not m.is_done]
    for member in at_work:
        if member.last_word is not None:
            return Verdict(f"{member} left: {member.last_word}", is_last_word=True)
    for member in at_work:
        if member.is_gone:
            return Verdict(f"{member} is gone: its process ended without a word")
    for member in at_work:
        if now_s - member.heard_s > heartbeat_s:
            return Verdict(f"{member} has not been heard from for {heartbeat_s:g} s")
    if not any(now_s - m.moved_s > timeout_s for m in at_work):
        return None
    last, first = min(at_work, key=lambda m: m.marks), max(at_work, key=lambda m: m.marks)
    if last.marks == first.marks:
        return Verdict(f"all ranks hang: none has gone on from mark {last.marks} ({last.doing}) for {timeout_s:g} s")
    behind = [str(m) for m in at_work if m.marks == last.marks]
    return Verdict(
        f"{' and '.join(behind)} {'hangs' if len(behind) == 1 else 'hang'}: at mark {last.marks} ({last.doing}) for "
        f"{now_s - last.moved_s:.0f} s, while others wait at mark {first.marks} ({first.doing})"
    )
