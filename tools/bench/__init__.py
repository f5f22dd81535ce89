"""Benchmarks: the shapes and figures that they speak of, and processes that are started, watched and ended."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cluster.fit.memory import Batch

ROOT = Path(__file__).parents[2]
PLACEMENTS = ("replicated", "zero3", "offload")


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of one placement; memory in MiB, by rank."""

    placement: str
    step_s: float
    """Median."""
    resident: list[float]
    """Median within the steps, pages that ranks share divided among them (Pss)."""
    most: list[float]
    """The largest of the same."""
    mapped: float
    """What of the largest rank's is pages of files: libraries, and an LLM that is mapped instead of read."""
    peak: list[float]
    """Of the whole run, loading included, shared pages counted whole (VmHWM)."""
    baseline: float
    """Resident in a process that has imported as much and holds no LLM."""
    predicted: float
    """What the formula says of ``most`` less ``baseline``."""
    loss: float
    """Of the last step."""

    @property
    def added(self) -> float:
        """The largest rank's memory within the steps, less the baseline."""
        return max(self.most) - self.baseline


BATCHES = (Batch(items=12, row_tokens=150, positions=77, answer=45), Batch(27, 152, 77, 45))


@contextmanager
def started(command: Sequence[str], log: Path, **pipes: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that ends with this block, and with this process however that ends."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    # glibc gives freed memory back at once, as a GPU's allocator can use it again: what is resident is what is in use.
    env |= {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    set_parent_death_signal, libc = 1, ctypes.CDLL(None)
    dies_too = partial(libc.prctl, set_parent_death_signal, signal.SIGTERM)  # torchrun ends its ranks on it
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=env, text=True, stderr=out, preexec_fn=dies_too, **pipes)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


Memory = dict[str, float]
"""Of one process in MiB. pss: resident, shared pages divided among those that share them; file: what of it is pages of
files (libraries, an LLM that is mapped); peak: the largest resident set so far, shared pages counted whole (VmHWM)."""


def memory_of(pid: int) -> Memory | None:
    """What /proc says of a process; None if it has ended."""
    try:
        lines = [
            line for name in ("smaps_rollup", "status") for line in Path(f"/proc/{pid}/{name}").read_text().splitlines()
        ]
        kib = {words[0]: words[1] for words in map(str.split, lines) if len(words) == 3}
        return {to: int(kib[name]) / 1024 for to, name in (("pss", "Pss:"), ("file", "Pss_File:"), ("peak", "VmHWM:"))}
    except (OSError, KeyError):
        return None


def ranks_of(launcher: int) -> dict[int, int]:
    """The ranks that a torchrun has started: their pids, by rank."""
    found: dict[int, int] = {}
    try:
        for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found |= {int(word[5:]): int(pid) for word in environment if word.startswith(b"RANK=")}
    except OSError:  # one of them has just ended
        pass
    return found
