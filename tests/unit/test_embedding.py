"""An LLM's input embedding, read without building the LLM, against the one that transformers loads."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from sm_train.data.target_set import TargetSet
from sm_train.errors import UserError
from sm_train.models.embedding import embedding_module, require_embeddings
from tests import builders, families

TYPES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3")
SHAPES: dict[str, dict[str, Any]] = {
    "fp32 untied": {"dtype": "float32", "tie_word_embeddings": False},
    "fp32 tied, padded vocabulary": {"dtype": "float32", "tie_word_embeddings": True, "extra_rows": 61},
    "bf16 untied, sharded": {"dtype": "bfloat16", "tie_word_embeddings": False, "sharded": True},
    "bf16 tied, sharded, padded": {
        "dtype": "bfloat16", "tie_word_embeddings": True, "sharded": True, "extra_rows": 61,
    },
    "fp16 untied": {"dtype": "float16", "tie_word_embeddings": False},
}  # fmt: skip


def require_exact(folder: Path, scaled: bool) -> None:
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings()
    ours = embedding_module(folder)
    ids = torch.arange(whole.weight.shape[0])
    with torch.inference_mode():
        theirs = whole(ids)
        assert ours(ids).dtype == theirs.dtype == whole.weight.dtype
        assert ours(ids).equal(theirs)
    assert theirs.equal(whole.weight) is not scaled
    assert not any(parameter.requires_grad for parameter in ours.parameters())


@pytest.mark.parametrize(("family", "shape"), product(TYPES, SHAPES))
def test_the_embedding_is_bit_for_bit_what_the_llm_computes(tmp_path: Path, family: str, shape: str) -> None:
    folder = builders.llm(tmp_path / "llm", family=family, **SHAPES[shape])
    names = set(builders.weight_names(folder))
    assert ("lm_head.weight" in names) is not SHAPES[shape]["tie_word_embeddings"]
    assert (folder / "model.safetensors.index.json").exists() is SHAPES[shape].get("sharded", False)
    require_exact(folder, scaled=family.startswith("gemma"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_of_a_multimodal_gemma_the_language_model_s_embedding_is_taken(tmp_path: Path, dtype: str) -> None:
    folder = families.multimodal_gemma3(tmp_path / "llm", dtype)
    assert any("vision" in name and "embedding" in name for name in builders.weight_names(folder))
    require_exact(folder, scaled=True)


def test_an_llm_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    untied = builders.without(
        builders.llm(tmp_path / "untied"), "embed_tokens.weight"
    )  # an lm_head is no input embedding
    with pytest.raises(UserError, match=r"no one input-embedding tensor .*embed_tokens.weight"):
        embedding_module(untied)
    odd = builders.llm(tmp_path / "odd")
    settings = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**settings, "hidden_size": 32}))
    with pytest.raises(UserError, match=r"has the shape \(\d+, 16\); its config says width 32"):
        embedding_module(odd)
    (odd / "config.json").write_text(json.dumps({**settings, "model_type": "unheard_of"}))
    with pytest.raises(UserError, match=r"config.json cannot be used .*unheard_of") as error:
        embedding_module(odd)
    assert "\n" not in str(error.value)


def test_the_llm_of_the_targets_is_accepted_and_one_changed_row_is_refused(
    shard_set: Path, llm_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    found = TargetSet(shard_set, "tiny")
    require_embeddings(llm_folder, found)
    other = Path(shutil.copytree(llm_folder, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.embed_tokens.weight"][int(found.token_ids[-1]), 0] += 1e-6
    builders.save_weights(other, tensors, sharded=False)
    remedy = f"name the LLM that the targets came from \\({llm_folder}\\)"
    with pytest.raises(UserError, match=f"LLM {other} does not embed tokens as target set {found.root}.*{remedy}"):
        require_embeddings(other, found)


def test_an_embedding_of_fewer_rows_or_another_width_is_refused(shard_set: Path, tmp_path: Path) -> None:
    found = TargetSet(shard_set, "tiny")
    for name, change in (("short", {"extra_rows": -200}), ("wide", {"hidden_size": 24})):
        with pytest.raises(UserError, match="does not embed tokens as target set"):
            require_embeddings(small_llm(tmp_path / name, **change), found)


def small_llm(folder: Path, extra_rows: int = 0, hidden_size: int = 16) -> Path:
    from safetensors.torch import load_file

    made = builders.llm(folder)
    tensors = load_file(made / "model.safetensors")
    table_VD = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.ones(len(table_VD) + extra_rows, hidden_size)
    builders.save_weights(made, tensors, sharded=False)
    settings = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**settings, "hidden_size": hidden_size}))
    return made
