"""Adapters of the LLM: in peft's format, at work only when asked for, the LLM's own weights never touched."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sm_train.errors import UserError
from sm_train.models import adapter
from sm_train.models.adapter import AdapterConfig, Adapters, WithAdapter
from sm_train.models.llm import load_model
from sm_train.models.mapper import MapperConfig, SpeechMapper

LORA = AdapterConfig(rank=3, alpha=6.0, modules=["q_proj", "v_proj"])
IDS_BL = torch.tensor([[1, 5, 9, 7, 3]])


@pytest.fixture
def llm(llm_folder: Path) -> Any:
    return load_model(str(llm_folder), None, "float32")


@pytest.fixture
def mapper() -> SpeechMapper:
    return SpeechMapper(MapperConfig(widths=[8, 8, 8], layers=1, heads=2, feed_forward=8, dropout=0.0), 8, 16)


def digest(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(name.encode() + t.numpy().tobytes() for name, t in tensors.items())).hexdigest()


def own_weights(llm: Any) -> dict[str, Tensor]:
    return {n.replace(".base_layer", ""): t for n, t in llm.state_dict().items() if ".lora_" not in n}


def random_adapter(llm: Any, mapper: SpeechMapper) -> dict[str, Tensor]:
    """Random numbers by an adapter's names; both matrices, so that it changes what the LLM says."""
    adapter.add(llm, LORA.description("tiny"))
    trained = WithAdapter(mapper, llm)
    made = {n: torch.randn_like(p) for n, p in trained.named_parameters() if n.startswith(adapter.PREFIX)}
    return adapter.split(made)[1]


def save(folder: Path, tensors: dict[str, Tensor], **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / adapter.WEIGHTS)
    (folder / adapter.CONFIG).write_text(json.dumps(LORA.description("tiny") | changes))
    return folder


def test_what_is_trained_is_the_mapper_and_the_adapter_alone(llm: Any, mapper: SpeechMapper) -> None:
    before = digest(own_weights(llm))
    adapter.add(llm, LORA.description("tiny"))
    trained = WithAdapter(mapper, llm)
    names = [name for name, _ in trained.named_parameters()]
    of_mapper, of_adapter = adapter.split(dict(trained.named_parameters()))
    assert list(of_mapper) == [name for name, _ in mapper.named_parameters()]
    layers = llm.config.num_hidden_layers
    assert len(of_adapter) == layers * 2 * 2
    assert len(set(names)) == len(names)
    assert all(p.requires_grad for p in trained.parameters())
    learns = {n for n, p in llm.named_parameters() if p.requires_grad}
    assert learns
    assert all(".lora_" in name for name in learns)
    assert sum(p.numel() for p in of_adapter.values()) == sum(p.numel() for p in llm.parameters() if p.requires_grad)
    assert digest(own_weights(llm)) == before


def test_a_checkpoint_s_names_come_back(llm: Any, mapper: SpeechMapper, tmp_path: Path) -> None:
    tensors = random_adapter(llm, mapper)
    folder = save(tmp_path, tensors)
    assert {n: t.tolist() for n, t in adapter.split(adapter.read(folder))[1].items()} == {
        n: t.tolist() for n, t in tensors.items()
    }
    assert adapter.folder_of(folder) == folder
    assert adapter.folder_of(tmp_path / "other") is None
    assert adapter.read(tmp_path / "other") == {}


def test_peft_itself_reads_the_folder_and_says_the_same(
    llm: Any, llm_folder: Path, mapper: SpeechMapper, tmp_path: Path
) -> None:
    from peft import PeftModel

    folder = save(tmp_path, random_adapter(load_model(str(llm_folder), None, "float32"), mapper))
    theirs = PeftModel.from_pretrained(load_model(str(llm_folder), None, "float32"), folder)
    plain = llm(IDS_BL).logits
    with Adapters(llm).at_work(folder):
        ours = llm(IDS_BL).logits
    assert torch.equal(ours, theirs(IDS_BL).logits)
    assert not torch.allclose(ours, plain, atol=1e-3)


def test_it_is_at_work_inside_alone_and_one_at_a_time(llm: Any, llm_folder: Path, tmp_path: Path) -> None:
    shape = MapperConfig(widths=[8, 8, 8], layers=1, heads=2, feed_forward=8)
    folders = [
        save(
            tmp_path / str(i), random_adapter(load_model(str(llm_folder), None, "float32"), SpeechMapper(shape, 8, 16))
        )
        for i in range(2)
    ]
    before, plain, adapters = digest(own_weights(llm)), llm(IDS_BL).logits, Adapters(llm)
    said = []
    for folder in [*folders, *folders]:
        with adapters.at_work(folder):
            said.append(llm(IDS_BL).logits)
        assert torch.equal(llm(IDS_BL).logits, plain)
        with adapters.at_work(None):
            assert torch.equal(llm(IDS_BL).logits, plain)
    assert torch.equal(said[0], said[2])
    assert torch.equal(said[1], said[3])
    assert not torch.equal(said[0], said[1])
    assert not any(p.requires_grad for p in llm.parameters())
    assert digest(own_weights(llm)) == before


def test_another_llm_s_adapter_is_refused(llm: Any, llm_folder: Path, mapper: SpeechMapper, tmp_path: Path) -> None:
    tensors = random_adapter(load_model(str(llm_folder), None, "float32"), mapper)
    folder = save(tmp_path / "a", {name: t for name, t in tensors.items() if "layers.0" in name})
    with (
        pytest.raises(UserError, match="its adapter was made for another LLM; evaluate it with the one"),
        Adapters(llm).at_work(folder),
    ):
        pass


def test_layers_that_the_llm_has_not_are_named(llm: Any) -> None:
    with pytest.raises(UserError, match=r"lora.modules \['qkv'\]: .*not found"):
        adapter.add(llm, AdapterConfig(rank=2, modules=["qkv"]).description("tiny"))


@pytest.mark.parametrize("wrong", [{"rank": -1}, {"rank": 2, "modules": []}, {"dropout": 1.0}])
def test_settings_beyond_their_bounds_are_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="lora"):
        AdapterConfig(**wrong)
