"""A precompute's figures as Ray's own metrics, which Ray's dashboard and Prometheus show."""

from __future__ import annotations

import time

from sm_train.meter import Event
from sm_train.records import Receipt

_COUNTERS = {
    "audio_s": "audio done, by the manifest, in seconds",
    "utterances_committed": "utterances committed",
    "encode_s": "seconds that encoders were at work",
    "deaths": "encoders' processes that ended",
    "probes": "parts of units that were tried alone",
    "barred": "utterances that end the encoder's process",
}


class Gauges:
    """Counters of a run, and its speed; each name begins with ``sm_train_``."""

    def __init__(self) -> None:
        from ray.util import metrics

        self._counters = {name: metrics.Counter(f"sm_train_{name}", text) for name, text in _COUNTERS.items()}
        self._quarantined = metrics.Counter(
            "sm_train_utterances_quarantined", "utterances quarantined", tag_keys=("reason",)
        )
        self._speed = metrics.Gauge("sm_train_times_real_time", "audio over time since the run began")
        self._begun, self._audio_s = time.monotonic(), 0.0

    def add(self, event: Event) -> None:
        """Count a finished unit, or an incident."""
        if not isinstance(event, Receipt):
            name = {"death": "deaths", "probe": "probes", "barred": "barred"}.get(event.kind)
            if name:
                self._counters[name].inc(1)
            return
        self._audio_s += event.audio_s
        self._speed.set(self._audio_s / max(time.monotonic() - self._begun, 1e-6))
        done = {"audio_s": event.audio_s, "utterances_committed": event.num_committed, "encode_s": event.encode_s}
        for name, value in done.items():
            if value > 0:
                self._counters[name].inc(value)
        for reason in event.reasons:
            self._quarantined.inc(1, tags={"reason": reason})
