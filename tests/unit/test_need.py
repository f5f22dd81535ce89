"""Will it fit: refused by the formula with the first remedy that the formula grants, and not where nothing is known."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cluster.fit.memory import GIB, LLAMA_31_8B
from cluster.fit.need import Need, Ranks, gpu_bytes, lack, need, require_fits
from sm_train import config
from sm_train.errors import UserError
from sm_train.models.mapper import MapperConfig
from sm_train.pretrain import PretrainConfig
from sm_train.tune import TuneConfig
from tests.builders import ROOT

SETTINGS = {
    "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 128_256, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def llm(tmp_path: Path) -> Path:
    """A folder with the config.json of an LLM of 8B parameters, and beside it a mapper of the paper's size."""
    (tmp_path / "8b").mkdir()
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1/mapper.safetensors").touch()
    mapper = {"mapper": config.to_mapping(MapperConfig()), "output_width": 4096}
    (tmp_path / "stage1/config.json").write_text(json.dumps(mapper))
    (tmp_path / "8b/config.json").write_text(json.dumps(SETTINGS))
    return tmp_path / "8b"


def tune(llm: Path, *words: str) -> TuneConfig:
    stage1 = [f"mapper={llm.parent / 'stage1'}"] if (llm.parent / "stage1").is_dir() else []
    return config.load(TuneConfig, [str(ROOT / "configs/tune/llama31-8b.yaml"), f"llm={llm}", *stage1, *words], "test")


def pretrain(*words: str) -> PretrainConfig:
    return config.load(PretrainConfig, [str(ROOT / "configs/pretrain/llama31-8b.yaml"), *words], "test")


def test_a_replicated_llm_of_8b_does_not_fit_a_v100_in_fp32_and_the_remedy_does(llm: Path) -> None:
    cfg = tune(llm, "placement=replicated", "engine.precision=fp32")
    ranks = Ranks(4, 4)
    with pytest.raises(UserError) as caught:
        require_fits(cfg, "V100-32", ranks)
    said = str(caught.value)
    assert "llm_weights 29.9" in said
    assert "31.7 GiB" in said
    assert "\n" not in said
    words = re.search(r"it fits with (.+)$", said)
    assert words is not None
    assert "placement=zero3" in words[1]
    remedied = tune(llm, "engine.precision=fp32", *words[1].partition(" on ")[0].split())
    count = re.search(r"on (\d+) ranks", words[1])
    require_fits(remedied, "V100-32", Ranks(int(count[1]), 4) if count else ranks)  # the remedy is true by the formula


def test_the_first_remedy_is_the_cheapest(llm: Path) -> None:
    cfg = tune(llm, "placement=replicated", "batch.samples=24")
    with pytest.raises(UserError, match=r"it fits with engine\.split=2$"):
        require_fits(cfg, "A100-40", Ranks(4, 4))
    assert require_fits(cfg, "A100-80", Ranks(4, 4)).device["llm_weights"] == 2 * LLAMA_31_8B.parameters
    with pytest.raises(UserError, match="no setting makes it fit"):
        require_fits(tune(llm, "engine.precision=fp32"), 2.0 * GIB, Ranks(1, 1))


def test_host_memory_is_judged_where_the_llm_waits_in_it(llm: Path) -> None:
    cfg = tune(llm, "placement=offload")
    found = need(cfg, Ranks(4, 4))
    assert found.host["llm_waiting"] == 2 * LLAMA_31_8B.parameters  # all four parts are on this node
    assert need(cfg, Ranks(8, 4)).host["llm_waiting"] == LLAMA_31_8B.parameters
    with pytest.raises(UserError, match=r"host memory has 16\.0 GiB"):
        require_fits(cfg, "A100-80", Ranks(4, 4), 16 * GIB)
    cast = need(tune(llm, "placement=replicated", "engine.precision=fp16", "engine.name=deepspeed"), Ranks(4, 4))
    assert cast.host["llm_loading"] == 4 * 2 * LLAMA_31_8B.parameters  # bf16 in its files: every rank casts a copy
    assert "llm_loading" not in need(tune(llm, "placement=replicated"), Ranks(4, 4)).host


def test_ranks_on_cpus_share_the_host(llm: Path) -> None:
    cfg = pretrain("engine.device=cpu", "engine.precision=fp32", "engine.name=local", "batch.frames=400")
    found = need(cfg, Ranks(2, 2, on_cpu=True))
    assert found.device["state_copy"] > 12 * 277e6 * 0.9  # of a save, which needs more than a small micro-batch
    assert found.host_bytes == found.device["context"] == 0
    require_fits(cfg, None, Ranks(2, 2, on_cpu=True), 64 * GIB)
    with pytest.raises(UserError, match="2 ranks would need"):
        require_fits(cfg, None, Ranks(2, 2, on_cpu=True), 12 * GIB)


def test_stage_1_grows_with_its_frames_and_shrinks_with_the_ranks_of_zero() -> None:
    small, large = (need(pretrain(f"batch.frames={n}"), Ranks(4, 4)).device for n in (10_000, 40_000))
    assert large["mapper_kept"] == pytest.approx(4 * small["mapper_kept"])
    assert need(pretrain(), Ranks(1, 1)).device["mapper_moments"] == pytest.approx(4 * small["mapper_moments"])
    assert require_fits(pretrain(), "V100-32", Ranks(4, 4)).device_bytes < 8 * GIB
    with pytest.raises(UserError, match=r"mapper_kept .* it fits with engine\.split="):
        require_fits(pretrain("batch.frames=400_000"), "V100-32", Ranks(4, 4))


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    found = require_fits(tune(Path("nobody/has-it")), "V100-32", Ranks())
    assert not found.is_known
    assert "is not known: it is neither a folder here nor in the hub's cache" in found.assumed[0]
    found = need(tune(write(tmp_path)), Ranks())
    assert any("no mapper, as runs/llama31-8b has none yet" in said for said in found.assumed)
    assert found.device["mapper_moments"] < 1e6  # nothing is refused for what is not known


def write(folder: Path, **settings: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**SETTINGS, **settings}))
    return folder


def test_a_device_by_name() -> None:
    assert gpu_bytes("H100-80") > gpu_bytes("A100-40")
    with pytest.raises(UserError, match="V100-32, A100-40"):
        gpu_bytes("T4")
    assert not lack(Need({"a": 9e9}, {}, ()), 1e10, None, Ranks())
    assert lack(Need({"a": 9.6e9}, {}, ()), 1e10, None, Ranks())  # 95% may be filled
