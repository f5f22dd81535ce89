"""A submission to this machine trains here, with what was submitted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.builders import run_module
from tests.training import shard_set, write_config

pytestmark = pytest.mark.slow


def test_submitted_here_a_run_trains_and_its_exit_code_is_the_command_s(tmp_path: Path) -> None:
    path = write_config(tmp_path / "run.yaml", shard_set(tmp_path / "set", 24), loop={"steps": 2})
    dry = run_module("cluster.submit", "pretrain", path, "dry_run=true", "ranks_per_node=2")
    assert dry.returncode == 0, dry.stderr
    assert "--nproc-per-node 2" in dry.stdout
    assert not (tmp_path / "run").exists(), "a dry run wrote something"
    ran = run_module("cluster.submit", "pretrain", path)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "run/checkpoints/step-2").is_dir()
    facts = json.loads((tmp_path / "run/environment.json").read_text())
    said = json.loads((tmp_path / "run/submitted/0001/submission.json").read_text())
    assert facts["code"] == said["revision"]
    broken = run_module("cluster.submit", "pretrain", path, "seed=1")
    assert broken.returncode == 2
    assert "seed" in broken.stderr
