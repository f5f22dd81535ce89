"""Stage 2 on an NVIDIA device: every placement in bf16 and fp16, beside the whole LLM on the card.

Each run is a process of its own, since CUDA does not survive a fork.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests import training, tuning

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA device"),
]


@pytest.fixture(scope="module")
def shard_folder(shard_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(shard_set, tmp_path_factory.mktemp("gpu") / "set"))


@pytest.fixture(scope="module")
def world(shard_folder: Path) -> Path:
    return tuning.world(shard_folder.parent, shard_folder)


def run(name: str, world: Path, shard_folder: Path, *words: str) -> list[float]:
    """The losses of a run of the command on the GPU."""
    path = tuning.write_config(world / f"{name}.yaml", world, shard_folder, engine={"device": "cuda"})
    done = training.run_command([sys.executable, "-m", "sm_train.tune", str(path), *words])
    assert done.returncode == 0, done.stderr
    return [line["loss"] for line in training.metrics(path.with_suffix(""))]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_placements_agree(world: Path, shard_folder: Path, precision: str) -> None:
    words = (f"engine.precision={precision}", "engine.name=deepspeed")
    whole = run(f"replicated-{precision}", world, shard_folder, "placement=replicated", *words)
    assert len(whole) == 8
    for placement in ("zero3", "offload"):
        found = run(f"{placement}-{precision}", world, shard_folder, f"placement={placement}", *words)
        assert found[:2] == pytest.approx(whole[:2], rel=5e-3)
        assert found == pytest.approx(whole, rel=5e-2)


def test_recomputed_activations_change_nothing(world: Path, shard_folder: Path) -> None:
    words = ("placement=zero3", "engine.precision=fp32")
    kept = run("kept", world, shard_folder, *words)
    assert run("recomputed", world, shard_folder, *words, "checkpoint_activations=true") == pytest.approx(
        kept, rel=1e-4
    )
