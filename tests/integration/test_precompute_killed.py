"""Precompute in one process, killed at any moment: no byte of the result changes."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from sm_train.data import shards
from sm_train.precompute import PrecomputeConfig, in_this_process, run
from tests import builders
from tests.integration.precompute_jobs import NUM_PARTS, command_file, hashes, parts, run_killed, start, wait_until


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_kills_at_random_syncs_and_renames_change_no_byte(
    cfg: PrecomputeConfig, reference: dict[str, str], tmp_path: Path, seed: int
) -> None:
    """A part costs 7 calls, the set's end 13, the target set 23; so these kills fall into every stage of the job."""
    rng = random.Random(seed)
    mine = replace(cfg, out=str(tmp_path / "set"))
    kills = 0
    while run_killed(mine, at_call=rng.randint(8, 60)):
        kills += 1
        seen = {name: h for name, h in hashes(tmp_path / "set").items() if name.startswith("part-")}
        assert seen.items() <= reference.items()  # what carries a part's name is whole, always
    assert kills > 1
    assert hashes(tmp_path / "set") == reference


@pytest.mark.parametrize("after_dataset", [False, True])
def test_a_kill_around_the_last_rename_leaves_the_set_incomplete_or_complete(
    cfg: PrecomputeConfig,
    reference: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after_dataset: bool,
) -> None:
    mine = replace(cfg, out=str(tmp_path / "set"), targets=[])
    real = os.replace

    def replace_and_die(source: Path, target: Path) -> None:
        if Path(target).name == shards.DATASET:
            if after_dataset:
                real(source, target)
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_and_die)
        with pytest.raises(KeyboardInterrupt):
            run(mine, in_this_process)
    assert shards.is_complete(tmp_path / "set") is after_dataset
    run(mine, lambda cfg, units: pytest.fail("no part needs encoding"))
    assert hashes(tmp_path / "set").items() <= reference.items()


@pytest.mark.slow
def test_a_killed_command_goes_on_where_it_stopped(
    cfg: PrecomputeConfig, reference: dict[str, str], tmp_path: Path
) -> None:
    out, file = tmp_path / "set", command_file(cfg, tmp_path)
    command = start("sm_train.precompute", file, f"out={out}")
    wait_until(lambda: parts(out) >= 3 or command.poll() is not None)
    command.kill()
    command.communicate()
    assert 3 <= parts(out) < NUM_PARTS
    again = builders.run_module("sm_train.precompute", file, f"out={out}")
    assert again.returncode == 0, again.stderr
    assert "parts are there already" in again.stdout
    assert hashes(out) == reference
