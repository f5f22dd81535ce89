"""``make chaos``: every call by which a run writes, and what a death or a loss of power right after it may leave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import saves, sets

pytestmark = pytest.mark.chaos


@pytest.mark.parametrize("begin", [saves.new, saves.went_further])
def test_every_state_is_recovered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin: Callable[[Path], object]
) -> None:
    found = saves.all_recovered(tmp_path, begin, monkeypatch, thorough=True)
    kinds = Counter(state.kind for state in found.states)
    print(
        f"\n{begin.__name__}: {found.calls} calls, {kinds['death']} different folders after a death of the process, "
        f"{kinds['power']} more after a loss of power"
    )


@pytest.mark.parametrize("begin_set", [sets.new, sets.quarantined])
def test_every_state_of_a_shard_set_is_recovered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin_set: Callable[[Path, Path], dict[str, Any]]
) -> None:
    found = sets.all_recovered(tmp_path, begin_set, monkeypatch, thorough=True)
    kinds = Counter(kind for _, kind, _ in found.found)
    print(
        f"\nprecompute, {begin_set.__name__}: {found.calls.total()} calls, {kinds['death']} different folders after a "
        f"death of the process, {kinds['power']} more after a loss of power"
    )
