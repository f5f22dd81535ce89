"""What a run says: lines on the terminal, metrics.jsonl and TensorBoard. The only rank-aware printing."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from sm_train import files

METRICS = "metrics.jsonl"
_TAIL_BYTES = 1 << 20

REVISION = "REVISION"
"""A file beside a copy of the code: the commit that it was copied at."""


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss; ``?`` if there is no end in sight."""
    if seconds == float("inf"):
        return "?"
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def say(text: str) -> None:
    """Print a line on rank 0 only."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, flush=True)


def revision() -> str | None:
    """The commit of this code, with ``+changes`` where it has some; None where there is no repository."""
    import subprocess

    here = Path(__file__).parent
    if (noted := here.parent / REVISION).is_file():
        return noted.read_text(encoding="utf-8").strip()
    try:
        head, changed = (
            subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", ":/"])
        )
    except (OSError, subprocess.CalledProcessError):  # no git here, or no repository
        return None
    return f"{head}+changes" if changed else head


def write_environment(folder: Path, world_size: int) -> None:
    """Record what this attempt runs on: software, device, ranks, code revision."""
    import platform
    from importlib.metadata import version

    import torch

    names = ("torch", "deepspeed", "transformers", "mosaicml-streaming", "ray")
    environment = {
        "python": platform.python_version(),
        "software": {name: version(name) for name in names},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "cpus": os.cpu_count(),
        "ranks": world_size,
        "code": revision(),
    }
    files.write_json(folder / "environment.json", environment)


def last_line(folder: Path) -> dict[str, Any]:
    """Attempt, step and time of the last whole line of a run's metrics; empty before the first."""
    path = folder / METRICS
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = file.read().splitlines()
    for line in reversed(lines):
        with suppress(ValueError, KeyError, TypeError):  # the last line of a killed run
            return {name: json.loads(line)[name] for name in ("attempt", "step", "time_s")}
    return {}


class RunLog:
    """The metrics of a training run: one JSON object a line, each with its attempt and its time; rank 0 alone writes.

    On resume, lines beyond the checkpoint's step are cut off, so that a step stands there once.
    """

    def __init__(self, folder: Path, attempt: int, resume_step: int) -> None:
        self.path, self.attempt = folder / METRICS, attempt
        self._cut_back(resume_step)
        self._file: TextIO = self.path.open("a", encoding="utf-8")
        from torch.utils.tensorboard import SummaryWriter

        self._board: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def _cut_back(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError, TypeError):  # the last line of a killed run
                continue
        files.write_text(self.path, "".join(kept))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line for a step; a value that is not finite, which JSON has no word for, is null."""
        finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
        facts = {"attempt": self.attempt, "step": step, "time_s": round(time.time(), 3)}
        self._file.write(json.dumps({**facts, **finite}) + "\n")
        self._file.flush()
        try:
            for name, value in values.items():
                if isinstance(value, int | float) and self._board is not None:
                    self._board.add_scalar(name, value, step)
        except OSError as error:  # its thread is dead from here on
            say(f"warning: TensorBoard's events cannot be written any more: {error.strerror or error}")
            self._board = None

    def close(self) -> None:
        """Flush and close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()
