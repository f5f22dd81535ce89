"""Work items as child processes, several at a time: done ones are not done again, a failed one stops what needs it.

Each child leads a process group of its own, so that Ctrl-C reaches the runner alone, which then asks each child to save
and leave. done/ITEM.json says what an item was begun with, how long it has taken, and whether it is done.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from types import FrameType
from typing import Any
from uuid import uuid4

from sm_train import files
from sm_train.runlog import clock
from tools.reproduce.graph import Item, hashes

POLL_S = 0.1
LEAVE_S = 60.0
"""How long a child may take to save and leave."""
TAIL_LINES = 15
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True, slots=True)
class Failed:
    """An item that went wrong."""

    name: str
    log: Path
    why: str


@dataclass
class Book:
    """What is written down about items, in ROOT/done and ROOT/logs."""

    root: Path
    items: Sequence[Item]
    _hashes: dict[str, str] = field(init=False, repr=False)
    _named: dict[str, Item] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._hashes, self._named = hashes(self.items), {item.name: item for item in self.items}

    def log(self, item: Item) -> Path:
        """Where an item's lines go."""
        return self.root / "logs" / f"{item.name}.log"

    def note(self, item: Item) -> dict[str, Any]:
        """What is written down about an item; empty before it was ever begun."""
        path = self._path(item)
        return files.read_object(path) if path.is_file() else {}

    def is_done(self, item: Item) -> bool:
        """Whether an item was done with this very command, on what is there now, and what it made is still there."""
        said = self.note(item)
        return bool(said.get("done")) and self._is_same(item, said) and item.makes.exists()

    def objection(self, item: Item) -> str | None:
        """Why an item must not be begun: its folder holds what another command has begun."""
        said = self.note(item)
        if item.keeps is None or not item.keeps.exists() or not said:
            return None
        if self._is_same(item, said):
            return None
        return f"{item.keeps} was begun with other words or inputs; remove it, or give another out=FOLDER"

    def write(self, item: Item, seconds: float, *, done: bool) -> None:
        """Write an item's note; seconds of this start are added to those before."""
        before = self.note(item)
        same = before.get("hash") == self._hashes[item.name] and not before.get("done")
        words = f"python -m {shlex.join(item.command)}"
        taken = seconds + (before["seconds"] if same else 0.0)
        note = {"hash": self._hashes[item.name], "command": words, "kind": item.kind, "seconds": taken, "done": done}
        made = {"token": uuid4().hex} if done else {}
        files.write_json(self._path(item), {**note, "built_on": self._built_on(item), **made})

    def _is_same(self, item: Item, said: Mapping[str, Any]) -> bool:
        on = self._built_on(item)
        return said.get("hash") == self._hashes[item.name] and said.get("built_on", on) == on

    def _built_on(self, item: Item) -> dict[str, str | None]:
        """By need the token of its last completion: done again, it makes another thing."""
        return {name: self.note(self._named[name]).get("token") for name in item.needs}

    def expected_s(self, item: Item) -> float | None:
        """What an item takes, by those of its row, or else of its kind, that are done; None where there are none."""
        done = [(other, note) for other in self.items if (note := self.note(other)).get("done")]
        row = item.name.rpartition("-")[0]
        alike = [n["seconds"] for o, n in done if o.kind == item.kind and o.name.rpartition("-")[0] == row]
        alike = alike or [n["seconds"] for o, n in done if o.kind == item.kind]
        return mean(alike) if alike else None

    def _path(self, item: Item) -> Path:
        return self.root / "done" / f"{item.name}.json"


@dataclass(slots=True)
class _Child:
    item: Item
    process: subprocess.Popen[bytes]
    begun_s: float


def run_items(items: Sequence[Item], root: Path, jobs: int) -> list[Failed]:
    """Run what is not done, at most ``jobs`` at a time, the first in order first.

    Returns:
        Those that failed, and those that were left out because they need one of these.

    Raises:
        KeyboardInterrupt: on Ctrl-C or SIGTERM, once every child has left.
    """
    book, failed = Book(root, items), list[Failed]()
    waiting = list[Item]()
    for item in items:  # what is needed stands before
        if not book.is_done(item) or {other.name for other in waiting} & set(item.needs):
            waiting.append(item)
    running: list[_Child] = []
    with _terminated_as_interrupted():
        try:
            while waiting or running:
                _leave_out(waiting, failed, book)
                pending = {item.name for item in waiting} | {child.item.name for child in running}
                for item in _ready(waiting, pending, jobs - len(running)):
                    waiting.remove(item)
                    if why := book.objection(item):
                        failed.append(Failed(item.name, book.log(item), why))
                    else:
                        running.append(_start(item, book))
                for child in [child for child in running if child.process.poll() is not None]:
                    running.remove(child)
                    failed.extend(_end(child, book))
                    _say(child, book, waiting, running, jobs)
                time.sleep(POLL_S)
        finally:
            _stop(running, book)
    return failed


def _leave_out(waiting: list[Item], failed: list[Failed], book: Book) -> None:
    """What needs an item that failed, and what needs that in turn: needs stand before."""
    lost = {one.name for one in failed}
    for item in [*waiting]:
        if lost & set(item.needs):
            waiting.remove(item)
            lost.add(item.name)
            failed.append(Failed(item.name, book.log(item), "left out: it needs one that failed"))


def _ready(waiting: Sequence[Item], pending: set[str], room: int) -> list[Item]:
    return [item for item in waiting if not pending & set(item.needs)][: max(room, 0)]


def _start(item: Item, book: Book) -> _Child:
    book.log(item).parent.mkdir(parents=True, exist_ok=True)
    book.write(item, 0.0, done=False)
    with book.log(item).open("ab") as log:
        log.write(f"$ python -m {shlex.join(item.command)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", *item.command], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            env=_environment(os.environ), start_new_session=True,
        )  # fmt: skip
    return _Child(item, process, time.monotonic())


def _environment(own: Mapping[str, str]) -> dict[str, str]:
    """A child's: one thread, no hub, and no rank that was this process's."""
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    return {**{name: value for name, value in own.items() if name not in ranks}, **ENVIRONMENT}


def _end(child: _Child, book: Book) -> list[Failed]:
    item, code = child.item, child.process.returncode
    done = code == 0 and item.makes.exists()
    book.write(item, time.monotonic() - child.begun_s, done=done)
    if done:
        return []
    return [Failed(item.name, book.log(item), f"exit code {code}" if code else f"it made no {item.makes}")]


def _say(child: _Child, book: Book, waiting: Sequence[Item], running: Sequence[_Child], jobs: int) -> None:
    num_done = sum(book.is_done(item) for item in book.items)
    expected = [book.expected_s(item) for item in waiting]
    for other in running:
        whole = book.expected_s(other.item)
        expected.append(None if whole is None else max(whole - (time.monotonic() - other.begun_s), 0.0))
    known = [seconds for seconds in expected if seconds is not None]
    left_s = sum(known) * len(expected) / len(known) / jobs if known else float("inf")
    how = "done" if book.is_done(child.item) else "FAILED"
    now = ", ".join(other.item.name for other in running)
    eta = f", ETA {clock(left_s)}" if expected else ""
    print(
        f"[{num_done}/{len(book.items)}] {child.item.name} {how} in {clock(time.monotonic() - child.begun_s)}"
        f"{eta}{f'; at work: {now}' if now else ''}",
        flush=True,
    )


def _stop(running: Sequence[_Child], book: Book) -> None:
    """Ask every child to save and leave; end what is left of its group after a while."""
    for child in running:
        child.process.terminate()
    until_s = time.monotonic() + LEAVE_S
    for child in running:
        try:
            child.process.wait(max(until_s - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.process.pid, signal.SIGKILL)
            child.process.wait()
            book.write(child.item, time.monotonic() - child.begun_s, done=False)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends this process as Ctrl-C does, its children first."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log; empty where there is none."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:])
