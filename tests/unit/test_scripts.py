"""Shell scripts pass shellcheck: the repository's own, and those that submissions write."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.builders import ROOT

SKIPPED = {".git", ".venv", "runs", "build"}


def is_script(path: Path) -> bool:
    """By its ending, or where it has none by its first line."""
    if path.suffix in (".sh", ".sbatch"):
        return True
    if path.suffix or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.readline(100).startswith(
            (b"#!/usr/bin/env bash", b"#!/bin/bash", b"#!/bin/sh", b"#!/usr/bin/env sh")
        )


def scripts() -> list[Path]:
    rooms = [path for path in ROOT.iterdir() if path.name not in SKIPPED]
    found = [path for room in rooms for path in (room.rglob("*") if room.is_dir() else [room])]
    return sorted(path for path in found if is_script(path))


def test_there_are_some() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in scripts()}
    assert {".ci/run", "cluster/slurm/train.sbatch", "tests/golden/local-pretrain.sh"} <= names


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="shellcheck is not installed: apt-get install shellcheck"
)
def test_they_pass_shellcheck() -> None:
    ran = subprocess.run(["shellcheck", *map(str, scripts())], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
