"""Attempts: the starts of a run, numbered; a newer one fences the older ones off.

attempts/N.json says who began start N, when and from which step, how far the starts before had come, and how it ended:
the run's log of incidents. The file is put only if absent, so that two starts at once get two numbers.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sm_train import files
from sm_train.errors import UserError

ATTEMPTS = "attempts"


def begin(run: Path, from_step: int = 0, ranks: int = 1, found: Mapping[str, Any] | None = None) -> int:
    """Count this start of a run; an older attempt that still lives will see that it is no longer its own.

    Args:
        found: attempt, step and time of the last line that stands in the log, some of which may be cut off now.
    """
    folder = run / ATTEMPTS
    folder.mkdir(parents=True, exist_ok=True)
    files.sync(run)
    number = current(run) + 1
    while True:
        try:
            os.close(os.open(_path(run, number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            break
        except FileExistsError:  # another start was faster
            number += 1
    facts = {"attempt": number, "host": socket.gethostname(), "pid": os.getpid(), "ranks": ranks}
    times = {"started": _said(time.time() - _age_s()), "began": _said(time.time())}
    files.write_json(_path(run, number), {**facts, **times, "from_step": from_step, "found": dict(found or {})})
    return number


def end(run: Path, attempt: int, at_step: int, how: str) -> None:
    """Write down how an attempt ended; one that was killed has no such line."""
    said = read(run, attempt)
    files.write_json(_path(run, attempt), {**said, "ended": _said(time.time()), "at_step": at_step, "how": how})


def read(run: Path, attempt: int) -> dict[str, Any]:
    """What is known of an attempt; nothing of one that was killed before it wrote a word."""
    path = _path(run, attempt)
    return dict(files.read_json(path)) if path.exists() and path.stat().st_size else {}


def current(run: Path) -> int:
    """The newest attempt's number; 0 before the first."""
    found = [re.fullmatch(r"(\d+)\.json", path.name) for path in (run / ATTEMPTS).glob("*.json")]
    return max((int(name[1]) for name in found if name), default=0)


def require_current(run: Path, attempt: int) -> None:
    """Raises UserError if a newer attempt has begun on this run folder."""
    if (newest := current(run)) != attempt:
        raise UserError(f"run {run}: attempt {newest} has begun since; attempt {attempt} leaves without writing")


def _path(run: Path, number: int) -> Path:
    return run / ATTEMPTS / f"{number}.json"


def _said(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _age_s() -> float:
    """Seconds since this process was started; 0 where the kernel does not say."""
    with suppress(OSError, IndexError):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"), 0.0)
    return 0.0
