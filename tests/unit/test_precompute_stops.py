"""Precompute stopped after any call by which it writes: a shorter form of ``make chaos``'s crash states."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import sets


def test_a_stop_after_any_call_leaves_whole_parts_and_the_job_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = sets.all_recovered(tmp_path, sets.new, monkeypatch, thorough=False)
    assert {kind for _, kind, _ in found.found} == {"death", "power"}
    assert {"writev", "write_bytes", "fsync", "rename", "replace", "mkdir"} <= found.calls.keys()
    assert len(found.found) > 100
