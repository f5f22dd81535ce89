"""Saving beside the training: the loop stands still while the state is copied, not while it is written."""

from __future__ import annotations

import concurrent.futures
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from sm_train.errors import UserError
from sm_train.runlog import say
from sm_train.train import attempts, checkpoint
from sm_train.train.checkpoint import Checkpoint

_LINGER_S = 20.0


class Saver:
    """Writes one checkpoint at a time in a thread of rank 0.

    Args:
        on_error: what a disk that is full or fails does: ``stop`` | ``go_on``; a newer attempt always stops this one.
    """

    def __init__(self, run: Path, attempt: int, description: Mapping[str, Any], keep: int, on_error: str) -> None:
        self.run, self.attempt, self.description = run, attempt, description
        self.keep, self.on_error = keep, on_error
        self._thread = ThreadPoolExecutor(1, "save")
        self._saving: Future[None] | None = None
        self.trouble: str | None = None
        """Why training must stop, once it must."""
        self.unsaved: str | None = None
        """Why the last save failed, if it did."""
        self.best_is_lost = False
        """The best validation so far was to be saved, and could not."""

    def start(self, saved: Checkpoint, *, is_best: bool) -> None:
        """Begin to write a checkpoint, once the one before is written."""
        self.wait()
        size_mb = 12 * sum(tensor.numel() for tensor in saved.state.weights.values()) >> 20
        what = f"the checkpoint of step {saved.global_step} ({size_mb} MB)"
        self._saving = self._thread.submit(self._save, what, saved, is_best)

    def is_in_trouble(self) -> bool:
        """Whether training must stop, as far as is known by now."""
        if self._saving is not None and self._saving.done():
            self.wait()
        return self.trouble is not None

    def require_current(self) -> None:
        """Learn whether a newer attempt has begun."""
        try:
            attempts.require_current(self.run, self.attempt)
        except UserError as error:
            self.trouble = str(error)

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Around writing to the run folder: a failure of the disk is said, and where it must be, kept as trouble."""
        try:
            yield
        except OSError as error:
            said = f"{what} could not be written: {error.strerror or error}"
            with suppress(OSError):
                newest = checkpoint.latest(self.run)
                free_mb = shutil.disk_usage(self.run).free >> 20
                said += (
                    f"; {self.run} has {free_mb} MB free, its newest checkpoint is {newest.name if newest else 'none'}"
                )
            self.unsaved = said
            if self.on_error == "stop":
                self.trouble = f"{said}; make room (or raise the limit) and run the same command again"
            else:
                say(f"warning: {said}; training goes on (loop.save_error=go_on)")

    def _save(self, what: str, saved: Checkpoint, is_best: bool) -> None:
        self.unsaved = None
        with self.guarded(what):
            checkpoint.save(self.run, self.attempt, saved, self.description, is_best=is_best, keep=self.keep)
            return
        self.best_is_lost |= is_best

    def before(self, leave: Callable[[str], object]) -> Callable[[str], object]:
        """What to do when another rank makes this one leave: let the save in progress end, within bounds."""

        def linger(why: str) -> None:
            if self._saving is not None:
                concurrent.futures.wait([self._saving], _LINGER_S)
            leave(why)

        return linger

    def wait(self) -> None:
        """Wait for the save in progress."""
        saving, self._saving = self._saving, None
        try:
            if saving is not None:
                saving.result()
        except UserError as error:  # a newer attempt owns the run
            self.trouble = str(error)

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wait()
        self._thread.shutdown()
