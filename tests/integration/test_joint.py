"""What pretraining replaces: a mapper from scratch through the frozen LLM, alone or with an adapter of it."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sm_train import files
from sm_train.models import adapter
from sm_train.models.mapper import SpeechMapper
from sm_train.scoring import mappers
from sm_train.train import checkpoint
from tests import training, tuning

pytestmark = pytest.mark.slow
JOINT = ("placement=replicated", "mapper=scratch", "objective.sigma=0", "seed=3")
LORA = (*JOINT, "lora.rank=2", "lora.dropout=0.1")
SHAPE = {"widths": [32, 16, 24], "layers": 1, "heads": 2, "feed_forward": 32}


@pytest.fixture(scope="module")
def shard_folder(shard_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(shard_set, tmp_path_factory.mktemp("joint") / "set"))


@pytest.fixture(scope="module")
def world(shard_folder: Path) -> Path:
    return tuning.world(shard_folder.parent, shard_folder)


def joint(folder: Path, name: str, world: Path, shard_folder: Path, words: tuple[str, ...], ranks: int = 1) -> Path:
    """The run folder of a joint run of eight steps."""
    path = tuning.write_config(folder / f"{name}.yaml", world, shard_folder, shape=SHAPE)
    assert training.in_ranks(ranks, lambda: tuning.train(path, *words)) == [0] * ranks
    return path.with_suffix("")


@pytest.fixture(scope="module")
def lora_run(world: Path, shard_folder: Path) -> Path:
    return joint(world, "lora", world, shard_folder, LORA, ranks=2)


def test_from_scratch_the_weights_follow_from_the_seed(world: Path, shard_folder: Path, tmp_path: Path) -> None:
    runs = [joint(tmp_path, "a", world, shard_folder, JOINT), joint(tmp_path, "b", world, shard_folder, JOINT)]
    other = joint(tmp_path, "c", world, shard_folder, (*JOINT, "seed=4"))
    one, two, three = (load_file(run / "checkpoints/latest/mapper.safetensors") for run in (*runs, other))
    training.assert_equal(one, two)
    assert any(not torch.equal(one[name], three[name]) for name in one)
    assert SpeechMapper.from_pretrained(runs[0] / "checkpoints/latest").cfg.widths == SHAPE["widths"]
    found = mappers.read(runs[0], checkpoint.find(runs[0]))
    assert found.name == "joint ASR/SQA-CE"
    assert found.is_tuned
    line = training.metrics(runs[0])[-1]
    assert line["num_items"] > 1
    assert line["llm_tokens"] > 10


def test_an_adapter_is_saved_beside_the_mapper_and_the_llm_is_not(lora_run: Path) -> None:
    latest = lora_run / "checkpoints/latest"
    own, lora = (load_file(latest / name) for name in ("mapper.safetensors", adapter.WEIGHTS))
    assert not any("lora" in name for name in own)
    assert all(".lora_" in name for name in lora)
    assert any(tensor.abs().sum() > 0 for name, tensor in lora.items() if "lora_B" in name)  # it has learnt
    assert files.read_json(latest / adapter.CONFIG)["r"] == 2
    assert mappers.read(lora_run, latest).name == "joint ASR/SQA-CE + LoRA"


def test_a_killed_joint_run_with_an_adapter_goes_on_bit_equal(
    lora_run: Path, world: Path, shard_folder: Path, tmp_path: Path
) -> None:
    path = tuning.write_config(tmp_path / "killed.yaml", world, shard_folder, shape=SHAPE)

    def work() -> None:
        if os.environ["RANK"] == "0":
            training.kill_at_step(6, path.with_suffix(""), saved=4)
        tuning.train(path, *LORA, "engine.timeout_s=20")

    assert training.in_ranks(2, work)[0] == -signal.SIGKILL
    assert training.in_ranks(2, lambda: tuning.train(path, *LORA)) == [0, 0]
    resumed = path.with_suffix("") / "checkpoints/latest"
    training.assert_equal(training.tensors_of(resumed), training.tensors_of(lora_run / "checkpoints/latest"))
    of_adapter = [load_file(folder / adapter.WEIGHTS) for folder in (resumed, lora_run / "checkpoints/latest")]
    training.assert_equal(*of_adapter)


def test_text_alone_is_part_of_what_a_run_is(world: Path, shard_folder: Path, tmp_path: Path) -> None:
    words = ("placement=replicated", "splice=text")
    run = joint(tmp_path, "text", world, shard_folder, words)
    found = mappers.read(run, checkpoint.find(run))
    assert found.name == "stage 2 ASR/SQA-CE+MSE, text alone"
    assert found.has_text_alone
