"""What a precompute run measures: a line on the terminal, log.jsonl beside the parts, figures at the end."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from sm_train.records import Quarantined, Receipt
from sm_train.runlog import clock

LOG = "log.jsonl"


@dataclass(frozen=True, slots=True)
class Incident:
    """What else a spread tells of its work, between receipts."""

    kind: Literal["death", "probe", "barred", "dispatch"]
    """A process ended; a part of a unit was tried alone; an utterance will be quarantined; work of the driver."""
    worker: str = ""
    """Where it happened, host:pid."""
    part: str = ""
    row: Quarantined | None = None
    """Who was barred."""
    seconds: float = 0.0
    """What the driver was at work in all."""
    units: int = 0
    """What a process that ended had at hand, and is begun again."""
    detail: str = ""
    """How it ended."""


Event = Receipt | Incident


class Meter:
    """Counts what comes back from encoders, and says it.

    Args:
        total_s: audio that is to be done, by the manifest.
        encoders: processes that encode.
        log: file to append to; None for none.
    """

    def __init__(self, total_s: float, encoders: int, log: Path | None) -> None:
        self.total_s, self.encoders = total_s, encoders
        self.audio_s = self.encode_s = self.dispatch_s = 0.0
        self.units = self.committed = 0
        self.reasons: Counter[str] = Counter()
        self.incidents: Counter[str] = Counter()
        self._begun = self._shown = time.monotonic()
        self._live = sys.stderr.isatty()
        self._log = _open(log) if log else None

    def add(self, event: Event) -> None:
        """Count a finished unit, or an incident."""
        if isinstance(event, Receipt):
            self._count(event)
        elif event.kind == "dispatch":
            self.dispatch_s += event.seconds
        else:
            self.incidents[event.kind] += 1
            more: dict[str, Any] = {"row": asdict(event.row)} if event.row else {}
            if event.kind == "death":
                more = {"units": event.units, "detail": event.detail}
            self._write({"event": event.kind, "worker": event.worker, "part": event.part, **more})
        now = time.monotonic()
        if now - self._shown > (0.2 if self._live else 10.0):
            self._shown = now
            self._show()

    def _count(self, receipt: Receipt) -> None:
        reasons = Counter(receipt.reasons)
        self.units += 1
        self.audio_s += receipt.audio_s
        self.encode_s += receipt.encode_s
        self.committed += receipt.num_committed
        self.reasons += reasons
        seconds = {name: round(getattr(receipt, name), 4) for name in ("audio_s", "encode_s", "write_s", "wall_s")}
        self._write(
            {"event": "unit", "part": receipt.part, "worker": receipt.worker, **seconds,
             "committed": receipt.num_committed, "quarantined": dict(reasons)}
        )  # fmt: skip

    @property
    def wall_s(self) -> float:
        """Seconds since the beginning."""
        return max(time.monotonic() - self._begun, 1e-6)

    @property
    def busy_share(self) -> float:
        """Of all encoders' time, what their encoders were at work."""
        return self.encode_s / (self.encoders * self.wall_s)

    def summary(self) -> dict[str, Any]:
        """The figures of the whole run; ``dispatch_share`` is the share of its time that the driver was not waiting."""
        return {
            "hours": round(self.audio_s / 3600, 6),
            "times_real_time": round(self.audio_s / self.wall_s, 2),
            "wall_s": round(self.wall_s, 3),
            "encoders": self.encoders,
            "encoder_busy_share": round(self.busy_share, 4),
            "dispatch_share": round(self.dispatch_s / self.wall_s, 4),
            "units": self.units,
            "committed": self.committed,
            "quarantined": dict(self.reasons),
            "deaths": self.incidents["death"],
            "probes": self.incidents["probe"],
            "barred": self.incidents["barred"],
        }

    def _write(self, values: dict[str, Any]) -> None:
        if self._log:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            self._log.write(json.dumps({"time": now, **values}, ensure_ascii=False) + "\n")
            self._log.flush()

    def _show(self) -> None:
        speed = self.audio_s / self.wall_s
        eta_s = max(self.total_s - self.audio_s, 0.0) / speed if speed else float("inf")
        line = (
            f"precompute: {self.audio_s / 3600:.2f} of {self.total_s / 3600:.2f} h audio, {speed:.0f}x real time, "
            f"encoders {100 * self.busy_share:.0f}% busy, {_quarantined(self.reasons)}, ETA {clock(eta_s)}"
        )
        print(f"\r{line}\x1b[K" if self._live else line, end="" if self._live else "\n", file=sys.stderr, flush=True)

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.units:
            self._show()
            if self._live:
                print(file=sys.stderr)
        if self.units or self.incidents:
            self._write({"event": "end", "error": kind.__name__ if kind else None, **self.summary()})
        if self._log:
            self._log.close()


def _quarantined(reasons: Counter[str]) -> str:
    if not reasons:
        return "0 quarantined"
    return f"{reasons.total()} quarantined ({', '.join(f'{n} {reason}' for reason, n in reasons.most_common())})"


def _open(path: Path) -> Any:
    """The log, to append whole lines to: a killed run may have left half a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_cut = False
    if path.exists() and path.stat().st_size > 0:
        with path.open("rb") as before:
            before.seek(-1, os.SEEK_END)
            is_cut = before.read() != b"\n"
    file = path.open("a", encoding="utf-8")
    if is_cut:
        file.write("\n")
    return file
