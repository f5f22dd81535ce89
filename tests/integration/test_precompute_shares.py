"""Shares of a set, encoded by processes beside each other, one of them killed: the bytes of one undisturbed run."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from sm_train.data import shards
from sm_train.precompute import PrecomputeConfig, run
from tests import builders
from tests.integration.precompute_jobs import NUM_PARTS, command_file, hashes, parts, start, wait_until

pytestmark = pytest.mark.slow


def test_three_at_once_one_killed_and_run_again(
    cfg: PrecomputeConfig, reference: dict[str, str], tmp_path: Path
) -> None:
    out, file = tmp_path / "set", command_file(replace(cfg, log="none"), tmp_path)
    shares = [start("sm_train.precompute", file, f"out={out}", f"share={i}/3") for i in range(3)]
    wait_until(lambda: shards.is_committed(out, "part-0000001") or shares[1].poll() is not None)
    os.kill(shares[1].pid, signal.SIGKILL)
    said = [process.communicate(timeout=120) for process in shares]
    assert [process.returncode for process in shares] == [0, -signal.SIGKILL, 0], said
    assert parts(out) < NUM_PARTS
    assert not shards.is_complete(out)
    again = builders.run_module("sm_train.precompute", file, f"out={out}", "share=1/3")
    assert again.returncode == 0, again.stderr
    plain = f"python -m sm_train.precompute {file} out={out}"
    assert again.stdout.splitlines()[-1] == f"{out}: share 1/3 is done, 5 parts; all 15 are there; now: {plain}"
    run(replace(cfg, out=str(out), log="none"), lambda cfg, units: pytest.fail("no part needs encoding"))
    assert hashes(out) == reference
