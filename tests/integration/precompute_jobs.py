"""What the tests of precompute share: its jobs as processes, and their results as hashes."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from sm_train import config
from sm_train.meter import LOG
from sm_train.precompute import PrecomputeConfig
from tests import builders

NUM_PARTS = 15


def command_file(cfg: PrecomputeConfig, folder: Path) -> Path:
    path = folder / "cfg.yaml"
    path.write_text(yaml.safe_dump(config.to_mapping(cfg)))
    return path


def hashes(root: Path) -> dict[str, str]:
    """Of every file but the measurements."""
    found = [path for path in root.rglob("*") if path.is_file() and path.name != LOG]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def parts(root: Path) -> int:
    return len(list(root.glob("part-*")))


def start(module: str, *argv: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, argv)],
        cwd=builders.ROOT, env=builders.child_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_until(holds: Callable[[], object], timeout_s: float = 180.0) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)
