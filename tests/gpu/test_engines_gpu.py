"""Stage 1 on an NVIDIA device: fp16 and bf16 under DeepSpeed, and both engines on the same card.

Each run is a process of its own, since CUDA does not survive a fork.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests import training

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA device"),
]
STEPS = 8
# A run of all steps that ends after six, as a kill would end it; the schedule is that of the whole run.
STOP_AFTER_SIX = """
import sys
from sm_train import pretrain
from sm_train.train import checkpoint
save = checkpoint.save
def stopping(run, attempt, saved, description, *, is_best, keep):
    save(run, attempt, saved, description, is_best=is_best, keep=keep)
    if saved.global_step == 6:
        import os
        os._exit(9)
checkpoint.save = stopping
pretrain.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training.shard_set(tmp_path_factory.mktemp("gpu") / "shards")


def run(folder: Path, name: str, shard_folder: Path, *words: str, code: str | None = None, expected: int = 0) -> Path:
    """Run the command on the GPU; returns the run folder."""
    loop = {"steps": STEPS, "save_every": 3, "validate_every": 0}
    path = training.write_config(folder / f"{name}.yaml", shard_folder, engine={"device": "cuda"}, loop=loop)
    program = ["-m", "sm_train.pretrain"] if code is None else ["-c", code]
    done = training.run_command([sys.executable, *program, str(path), *words])
    assert done.returncode == expected, done.stderr
    return path.with_suffix("")


def state_of(folder: Path) -> dict[str, object]:
    state: dict[str, object] = json.loads((folder / "checkpoints/latest/state.json").read_text())
    return state


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_goes_on_bit_equal(shard_folder: Path, tmp_path: Path, precision: str, stage: int) -> None:
    words = ("engine.name=deepspeed", f"engine.precision={precision}", f"engine.zero_stage={stage}")
    whole = run(tmp_path, "whole", shard_folder, *words)
    killed = run(tmp_path, "killed", shard_folder, *words, code=STOP_AFTER_SIX, expected=9)
    assert state_of(killed)["global_step"] == 6
    run(tmp_path, "killed", shard_folder, *words)
    assert state_of(killed) == state_of(whole)
    assert (state_of(whole)["scaler"] is not None) == (precision == "fp16")
    training.assert_equal(
        training.tensors_of(killed / "checkpoints/latest"), training.tensors_of(whole / "checkpoints/latest")
    )
    assert training.losses(killed) == training.losses(whole)
    assert list(training.losses(whole)) == list(range(1, STEPS + 1))


def test_fp16_skips_only_while_the_scale_comes_down_and_then_learns(shard_folder: Path, tmp_path: Path) -> None:
    words = ("engine.name=deepspeed", "engine.precision=fp16", "loop.steps=40")
    lines = training.metrics(run(tmp_path, "run", shard_folder, *words))
    skipped = [line["step"] for line in lines if line["skipped"]]
    assert len(skipped) < 20
    assert lines[-1]["scale"] > 1
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_engines_train_alike(shard_folder: Path, tmp_path: Path, precision: str) -> None:
    local = training.losses(run(tmp_path, "local", shard_folder, f"engine.precision={precision}"))
    words = ("engine.name=deepspeed", f"engine.precision={precision}")
    zero = training.losses(run(tmp_path, "zero", shard_folder, *words))
    assert zero == pytest.approx(local, rel=1e-4 if precision == "fp32" else 1e-2)


def test_the_cpu_goes_on_with_what_the_gpu_began(shard_folder: Path, tmp_path: Path) -> None:
    whole = run(tmp_path, "whole", shard_folder)
    begun = run(tmp_path, "begun", shard_folder, code=STOP_AFTER_SIX, expected=9)
    copied = tmp_path / "copied"
    shutil.copytree(begun, copied, symlinks=True)
    run(tmp_path, "copied", shard_folder, "engine.device=cpu", "mapper.dropout=0.1")
    first, second = training.losses(whole), training.losses(copied)
    assert [first[step] for step in range(1, 7)] == [second[step] for step in range(1, 7)]
    assert second[STEPS] == pytest.approx(first[STEPS], rel=0.1)  # another generator draws the dropout
