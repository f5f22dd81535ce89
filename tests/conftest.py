"""Fixtures that several rooms share, and the time each folder of tests takes."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections import defaultdict
from pathlib import Path

import pytest

from sm_train.data import arrival
from tests import builders

arrival.PATIENCE_S = 0.0  # what tests take away does not come

_seconds: dict[str, float] = defaultdict(float)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up the time of a test's folder."""
    _seconds[str(Path(report.location[0]).parent)] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print it."""
    shown = ", ".join(f"{folder} {seconds:.1f} s" for folder, seconds in sorted(_seconds.items()))
    terminalreporter.write_line(f"time by folder: {shown}")


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random SeamlessM4T-v2 checkpoint of three layers and width 32."""
    return builders.seamless(tmp_path_factory.mktemp("models") / "encoder")


@pytest.fixture(scope="session")
def llm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama of width 16 with its tokenizer; its pad is a token of its own."""
    return builders.llm(tmp_path_factory.mktemp("models") / "llm")


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of 30 synthetic utterances of 1 to 3 s."""
    return builders.corpus(tmp_path_factory.mktemp("corpus"), 30)


@pytest.fixture(scope="session")
def shard_set(tmp_path_factory: pytest.TempPathFactory, manifest: Path, encoder_folder: Path, llm_folder: Path) -> Path:
    """A complete shard set of :func:`manifest` with the target set ``tiny``; tests that change it copy it first."""
    from sm_train.models.speech import EncoderConfig
    from sm_train.models.targets import TargetConfig
    from sm_train.precompute import PrecomputeConfig, in_this_process, run

    out = tmp_path_factory.mktemp("sets") / "set"
    encoder = EncoderConfig(path=str(encoder_folder), layer=2, device="cpu")
    targets = [TargetConfig("tiny", str(llm_folder))]
    cfg = PrecomputeConfig(str(manifest), str(out), encoder, targets, unit_utterances=8, batch_s=12.0)
    run(cfg, in_this_process)
    return out
