"""A precompute job and what an undisturbed run of it gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from sm_train.models.speech import EncoderConfig
from sm_train.models.targets import TargetConfig
from sm_train.precompute import PrecomputeConfig
from tests import builders
from tests.integration.precompute_jobs import command_file, hashes


@pytest.fixture(scope="session")
def cfg(manifest: Path, encoder_folder: Path, llm_folder: Path) -> PrecomputeConfig:
    """15 parts of two utterances; ``out`` is set by each test."""
    encoder = EncoderConfig(path=str(encoder_folder), layer=2, device="cpu")
    targets = [TargetConfig("tiny", str(llm_folder))]
    return PrecomputeConfig(str(manifest), "?", encoder, targets, unit_utterances=2, batch_s=5.0)


@pytest.fixture(scope="session")
def reference(cfg: PrecomputeConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The hash of every file of an undisturbed run of the command."""
    folder = tmp_path_factory.mktemp("reference")
    done = builders.run_module("sm_train.precompute", command_file(cfg, folder), f"out={folder / 'set'}")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return hashes(folder / "set")
