"""Shapes of what a config names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from cluster.fit.memory import LLAMA_31_8B
from cluster.fit.shapes import read_shape, shape_of, table_shape
from sm_train.errors import UserError
from tests import training
from tests.builders import ROOT
from tests.unit.test_need import SETTINGS, write


def test_shapes_of_other_families(tmp_path: Path) -> None:
    assert read_shape(str(write(tmp_path))) == (LLAMA_31_8B, "bfloat16")
    gemma = {**SETTINGS, "model_type": "gemma3_text", "head_dim": 256}
    del gemma["tie_word_embeddings"]
    found = shape_of({"text_config": gemma}, "gemma")
    assert (found.is_tied, found.attention_width) == (True, 32 * 256)
    assert found.parameters < replace(found, is_tied=False).parameters
    with pytest.raises(UserError, match="mixture of experts"):
        shape_of({**SETTINGS, "num_local_experts": 8}, "moe")
    with pytest.raises(UserError, match="has no num_hidden_layers"):
        shape_of({"hidden_size": 8}, "other")


def test_a_llama_s_shape_counts_the_numbers_of_its_file() -> None:
    folder = ROOT / "tools/miniature/weights/llm"
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        count = sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
    assert read_shape(str(folder))[0].parameters == count


def test_a_table_s_shape_is_in_its_header(tmp_path: Path) -> None:
    root = training.shard_set(tmp_path / "set")
    assert table_shape(str(root), training.TARGET) == (len(training.WORDS), training.D)
    assert table_shape("s3://bucket/set", training.TARGET) is None
    (root / "targets" / training.TARGET / "embedding.safetensors").write_bytes(b"\x05")
    assert table_shape(str(root), training.TARGET) is None
