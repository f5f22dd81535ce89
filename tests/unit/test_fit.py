"""Will it fit: refused by the formula with the first remedy that the formula grants, and not where nothing is known."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.fit import Need, Ranks, gpu_bytes, lack, need, require_fits
from cluster.hub import Answer, ask, folder_of, missing_weights
from cluster.memory import GIB, LLAMA_31_8B
from cluster.rows import Rows, read_rows
from cluster.shapes import read_shape, shape_of, table_shape
from sm_train import config
from sm_train.errors import UserError
from sm_train.models.mapper import MapperConfig
from sm_train.pretrain import PretrainConfig
from sm_train.tune import TuneConfig
from tests import training
from tests.builders import ROOT
from tests.unit.test_fetch import Hub, hub  # noqa: F401

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
    with pytest.raises(UserError, match="no setting of one key"):
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
    from safetensors import safe_open

    folder = ROOT / "tools/miniature/weights/llm"
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        count = sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
    assert read_shape(str(folder))[0].parameters == count


def test_rows_come_from_the_tables(tmp_path: Path) -> None:
    root = training.shard_set(tmp_path / "set")
    rows, assumed = read_rows([str(root)], training.TARGET, ["train"])
    assert not assumed
    assert 2 <= rows.positions <= rows.longest_positions <= 16
    assert 2 <= rows.tokens <= rows.longest_tokens <= 9
    assert table_shape(str(root), training.TARGET) == (len(training.WORDS), training.D)
    assert read_rows([str(tmp_path / "none")], "x", ["train"])[1]
    assert rows.piece(100, 100) == 4 * rows.longest_positions  # no utterance is cut
    assert Rows().batch(samples=12, tokens=0, split=1).items == 12
    assert Rows().batch(samples=0, tokens=4000, split=2).tokens <= 2000


def test_a_device_by_name() -> None:
    assert gpu_bytes("H100-80") > gpu_bytes("A100-40")
    with pytest.raises(UserError, match="V100-32, A100-40"):
        gpu_bytes("T4")
    assert not lack(Need({"a": 9e9}, {}, ()), 1e10, None, Ranks())
    assert lack(Need({"a": 9.6e9}, {}, ()), 1e10, None, Ranks())  # 95% may be filled


def test_a_model_is_here_whole_or_not(tmp_path: Path) -> None:
    folder = write(tmp_path)
    assert ask(str(folder), None) == Answer(
        False, f"{folder} lacks model.safetensors",
        "fetch it again, or copy it with python -m tools.fetch where there is internet, and give its folder",
    )  # fmt: skip
    (folder / "model.safetensors").write_bytes(b"")
    assert ask(str(folder), None).is_had
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "1.safetensors"}}))
    assert missing_weights(folder) == "1.safetensors"
    assert not ask("/nowhere/at/all", None).is_had
    assert folder_of("/nowhere/at/all") is None


def test_a_hub_is_asked_and_answers(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    from huggingface_hub import constants

    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in ask("a/llm", None, endpoint=hub.address).text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.gated = {"b/llm"}
    assert ask("a/llm", None, endpoint=hub.address).is_had
    gated = ask("b/llm", None, endpoint=hub.address)
    assert (gated.is_had, "HF_TOKEN" in gated.remedy) == (False, True)
    assert "has no a/none" in ask("a/none", None, endpoint=hub.address).text
    assert "does not answer" in ask("a/llm", None, endpoint="http://127.0.0.1:9", timeout_s=3).text
    assert not any("safetensors" in asked for asked in hub.asked)
