"""Builders for tests of submission: jobs as a person's command line makes them, seen from nodes with fixed paths."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster import submit
from cluster.submission import Job
from tests.builders import ROOT

GOLDEN = ROOT / "tests/golden"
HOME = "/shared/project"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to submit from, with the shipped configs; it is where HOME is on the nodes."""
    for name in ("configs", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HOME", "PYTHONPATH", "TOKENIZERS_PARALLELISM", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def job(*words: str) -> Job:
    """A job of the folder that this process is in, whose nodes see it at HOME."""
    return submit.read([*words, f"workdir={HOME}", "python=python"])


def require_golden(name: str, text: str) -> None:
    """Compare with tests/golden/NAME; with GOLDEN=write in the environment, write it instead."""
    path = GOLDEN / name
    if os.environ.get("GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text(), f"{path} differs; if that is meant, run again with GOLDEN=write"
