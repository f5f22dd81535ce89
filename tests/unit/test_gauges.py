"""Ray's metrics of a run."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.encoding.gauges import Gauges
from sm_train.meter import Incident
from sm_train.records import Receipt


def test_what_a_run_counts_goes_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.util import metrics

    found: Counter[str] = Counter()

    def metric(name: str, text: str, tag_keys: tuple[str, ...] = ()) -> Any:
        assert text

        def inc(value: float, tags: dict[str, str] | None = None) -> None:
            assert value > 0
            assert set(tags or {}) == set(tag_keys)
            found[" ".join([name, *(tags or {}).values()])] += value  # type: ignore[assignment]

        return SimpleNamespace(inc=inc, set=lambda value: found.update({name: 0 * value}))

    monkeypatch.setattr(metrics, "Counter", metric)
    monkeypatch.setattr(metrics, "Gauge", metric)
    gauges = Gauges()
    gauges.add(Receipt("part-0000000", 6, 2, 40.0, 0.5, 0.1, 1.0, ("silent", "too_long")))
    gauges.add(Receipt("part-0000001", 8, 0, 30.0, 0.0, 0.1, 1.0))
    gauges.add(Incident("death"))
    gauges.add(Incident("dispatch", seconds=3))
    assert found == {
        "sm_train_audio_s": 70, "sm_train_utterances_committed": 14, "sm_train_encode_s": 0.5, "sm_train_deaths": 1,
        "sm_train_utterances_quarantined silent": 1, "sm_train_utterances_quarantined too_long": 1,
        "sm_train_times_real_time": 0,
    }  # fmt: skip
