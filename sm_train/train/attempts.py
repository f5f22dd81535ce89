"""Attempts: the starts of a run, numbered; a newer one fences the older ones off.

attempts/N.json says who began start N, when and from which step, and how it ended: the run's log of incidents. The
file is put only if absent, so that two starts at once get two numbers.
"""

from __future__ import annotations

import os
import re
import socket
import time
from pathlib import Path
from typing import Any

from sm_train import files
from sm_train.errors import UserError

ATTEMPTS = "attempts"


def begin(run: Path, from_step: int = 0, ranks: int = 1) -> int:
    """Count this start of a run; an older attempt that still lives will see that it is no longer its own."""
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
    files.write_json(_path(run, number), {**facts, "from_step": from_step, "began": _now()})
    return number


def end(run: Path, attempt: int, at_step: int, how: str) -> None:
    """Write down how an attempt ended; one that was killed has no such line."""
    said = read(run, attempt)
    files.write_json(_path(run, attempt), {**said, "ended": _now(), "at_step": at_step, "how": how})


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


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
