"""The bench of padding: its lengths are those it says, its shares are right, and it goes on without a peer."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest

from tools.bench import padding


def test_the_lengths_are_those_the_page_names() -> None:
    seconds = padding.speech_lengths(281_241, 0) / padding.FRAMES_PER_S
    assert seconds.mean() == pytest.approx(12.4, abs=0.1)
    assert 1.3 <= seconds.min() <= 1.5
    assert 34 < seconds.max() <= 35


def test_shares_of_a_step_worked_out_by_hand() -> None:
    lengths = np.array([10, 8, 5, 5, 4])
    found = padding.shares(lengths, [np.array([0, 1]), np.array([2, 3]), np.array([4])], 2, 20)
    assert found.filled == pytest.approx(32 / 34)
    assert found.of_budget == pytest.approx(34 / 3 / 20)
    assert found.waiting == pytest.approx(1 - 15 / 20)
    assert found.largest == 1.0


@pytest.mark.parametrize("name", ["ours", "ours, lane windows", "transformers group_by_length"])
def test_a_sampler_gives_every_item_once_and_keeps_the_budget(name: str) -> None:
    lengths = padding.speech_lengths(5000, 1)
    batches = padding.SAMPLERS[name](lengths, 5000, 4, 0)
    assert sorted(np.concatenate(batches).tolist()) == list(range(5000))
    assert max(lengths[one].max() * len(one) for one in batches) <= 5000


def test_a_peer_that_is_not_installed_is_named_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "lhotse":
            raise ImportError("No module named 'lhotse'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    padding.main(["utterances=3000", "budgets=[100, 200]", "lanes=[2]", "sizes=[1000]"])
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if "lhotse" in line]
    assert len(said) == 1
    assert "not run: No module named 'lhotse'; pip install" in said[0]
    assert sum("transformers group_by_length" in line for line in lines) == 2
    assert any(line.startswith("| 1,000 |") for line in lines)
