"""10,000 random corruptions: every one found before a sample is used, healed, or in bytes that nobody uses."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.corruption import run_all

pytestmark = pytest.mark.chaos

COUNTS = {
    "feature shard, bits": 3500,
    "feature shard, bits of its head": 1500,
    "feature shard, cut short": 1000,
    "feature shard, another of its length": 300,
    "feature shard, samples swapped": 400,
    "token shard, bits": 800,
    "token shard, cut short": 300,
    "token shard, another of its length": 200,
    "table": 600,
    "embedding": 400,
    "mirror, damaged while in use": 700,
    "mirror, stale or damaged after a restart": 300,
}


def test_ten_thousand_corruptions_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_all(tmp_path, COUNTS, seed=2026)
    assert sum(found.values()) == sum(COUNTS.values()) == 10_000
    with capsys.disabled():
        print()
        for (kind, outcome), count in sorted(found.items()):
            print(f"{kind}: {count} {outcome}")
    assert found["feature shard, bits of its head", "in bytes that nobody uses"] < 500
    assert all(outcome != "in bytes that nobody uses" for kind, outcome in found if "bits" not in kind)
