"""What a check found, and checks that may not take for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from sm_train.errors import UserError, printable

OK, WARN, FAIL, SKIP = "ok", "warn", "FAIL", "skip"


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check."""

    mark: str
    """ok | warn | FAIL | skip"""
    name: str
    text: str
    remedy: str = ""
    """What to do, for a warning or a failure."""

    def __str__(self) -> str:
        line = f"{self.mark:4}  {self.name:12}  {printable(self.text)}"
        return f"{line}\n      {printable(self.remedy)}" if self.remedy and self.mark in (WARN, FAIL) else line


Findings = Finding | Iterable[Finding]


class Check(NamedTuple):
    """A check by its name; what it looks at is bound already."""

    name: str
    look: Callable[[], Findings]
    limit_s: float = 10.0


def carry_out(check: Check) -> list[Finding]:
    """What a check finds; one that is not through within its limit, or raises, has failed, and the others go on."""
    found: list[Finding] = []
    raised: list[BaseException] = []

    def look() -> None:
        try:
            seen = check.look()
            found.extend([seen] if isinstance(seen, Finding) else seen)
        except BaseException as error:
            raised.append(error)

    worker = threading.Thread(target=look, name=check.name, daemon=True)
    begun = time.monotonic()
    worker.start()
    worker.join(check.limit_s)
    if worker.is_alive():
        after = f"no answer within {time.monotonic() - begun:.0f} s"
        return [Finding(FAIL, check.name, after, "find what it waits for: a dead mount, an address behind a firewall")]
    if raised:
        return [_of_error(check.name, raised[0])]
    return found


def _of_error(name: str, error: BaseException) -> Finding:
    """A person's mistake says itself what to do; anything else is named."""
    words = " ".join(str(error).split())
    if not isinstance(error, UserError):
        return Finding(FAIL, name, f"{type(error).__name__}: {words}", "mend what it names, or report it as a bug")
    text, _, remedy = words.partition("; ")
    return Finding(FAIL, name, text, remedy)
