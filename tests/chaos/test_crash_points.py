"""``make chaos``: every call by which a run writes, and what a death or a loss of power right after it may leave."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos import saves

pytestmark = pytest.mark.chaos


@pytest.mark.parametrize("begin", [lambda run: run.mkdir(), saves.went_further], ids=["new", "went-further"])
def test_every_state_is_recovered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin: Callable[[Path], object]
) -> None:
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", saves._NoBoard)
    run = tmp_path / "run"
    begin(run)
    stops = saves.stops(run, monkeypatch, thorough=True)
    expected = saves.ending(run)
    failed: Counter[str] = Counter()
    for number, state in enumerate(stops.states):
        try:
            saves.recover(state, tmp_path / str(number), expected, monkeypatch)
        except Exception as error:
            failed[f"{state.kind}: {str(error)[:150]}"] += 1
            print(state.call, state.kind, state.saved, str(error)[:300].replace("\n"," "))
            print(sorted(k for k in state.tree if "attempts" not in k))
            shutil.rmtree(tmp_path / str(number))
    kinds = Counter(state.kind for state in stops.states)
    print(f"\n{stops.calls} calls, {kinds['death']} states after a death, {kinds['power']} more after a loss of power")
    assert not failed, failed
