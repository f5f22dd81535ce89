"""The formula of memory against what torch really keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cluster.fit.memory import (
    BUCKET,
    CONTEXT_BYTES,
    LLAMA_31_8B,
    Batch,
    Llama,
    Mapper,
    gathered_bytes,
    kept_bytes,
    llm_kept,
    memory_terms,
)
from sm_train.models.mapper import PAPER_PARAMETERS, MapperConfig, SpeechMapper
from tools.bench import BATCHES, PLACEMENTS

SMALL = Llama(layers=2, width=128, heads=4, kv_heads=2, feed_forward=384, vocabulary=300)
MAPPER = Mapper(MapperConfig(), 4096)


def bytes_kept(module: nn.Module, run: object) -> int:
    """Bytes that autograd keeps during ``run()``, each storage once, the module's own weights left out."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()  # type: ignore[operator]
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("keeps_inputs", "recomputed"), [(False, False), (True, False), (False, True)])
def test_a_frozen_llama_keeps_what_the_formula_says(
    dtype: torch.dtype, keeps_inputs: bool, recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    if keeps_inputs:
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        from deepspeed.runtime.zero.linear import zero3_linear_wrap

        monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    batch = Batch(items=3, row_tokens=40, positions=20, answer=5)

    def kept(layers: int) -> int:
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=SMALL.vocabulary, hidden_size=SMALL.width, intermediate_size=SMALL.feed_forward,
            num_hidden_layers=layers, num_attention_heads=SMALL.heads, num_key_value_heads=SMALL.kv_heads,
        )).to(dtype).eval().requires_grad_(False)  # fmt: skip
        if recomputed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
        embeds = torch.randn(batch.items, batch.row_tokens, SMALL.width, dtype=dtype, requires_grad=True)
        is_real = torch.ones(batch.items, batch.row_tokens, dtype=torch.long)
        is_real[0, :7] = 0
        return bytes_kept(
            model,
            lambda: model(inputs_embeds=embeds, attention_mask=is_real, use_cache=False, logits_to_keep=batch.answer),
        )

    one, two = kept(1), kept(2)
    if recomputed:
        assert two - one == batch.tokens * dtype.itemsize * SMALL.width
        return
    layer = kept_bytes(SMALL, batch.row_tokens, dtype.itemsize, keeps_inputs=keeps_inputs)
    assert two - one == batch.tokens * layer
    whole = llm_kept(SMALL, batch, dtype.itemsize, keeps_inputs=keeps_inputs, recomputed=False)
    assert two == pytest.approx(whole, rel=0.03)  # angles, which all layers share, are left out


def test_a_llama_s_parameters_are_counted() -> None:
    assert LLAMA_31_8B.parameters == 8_030_261_248
    assert abs(MAPPER.parameters - PAPER_PARAMETERS) < 10_000  # pre-norm has a last norm in each block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mapper_keeps_what_the_formula_says(dtype: torch.dtype) -> None:
    cfg = MapperConfig(widths=[64, 128, 256], layers=2, heads=4, feed_forward=192, dropout=0.0)
    mapper = SpeechMapper(cfg, 64, 96).train().to(dtype)
    feats, frames = torch.randn(3, 160, 64), torch.tensor([160, 160, 150])
    found = bytes_kept(mapper, lambda: mapper(feats, frames))
    assert found == pytest.approx(3 * 40 * Mapper(cfg, 96).kept_bytes(dtype.itemsize, 0), rel=0.02)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_terms_of_memory(placement: str, ranks: int) -> None:
    batch, p, n = BATCHES[0], LLAMA_31_8B.parameters, MAPPER.parameters
    terms = memory_terms(LLAMA_31_8B, MAPPER, batch, placement, ranks, "bf16")
    shards = 1 if placement == "replicated" else ranks
    assert terms["llm_weights"] == (0 if placement == "offload" else 2 * p / shards)
    assert terms["mapper_masters"] + terms["mapper_moments"] + terms["mapper_gradient"] == pytest.approx(
        16 * n / shards
    )
    assert terms["bucket"] == (0 if placement == "replicated" else 4 * BUCKET)
    assert terms["context"] == CONTEXT_BYTES
    whole = placement == "replicated" or (placement == "zero3" and ranks == 1)
    assert (terms["gathered"] == 0) == whole
    recomputed = memory_terms(LLAMA_31_8B, MAPPER, batch, placement, ranks, "bf16", recomputed=True)
    assert recomputed["llm_kept"] < terms["llm_kept"] / 10
    assert {k: v for k, v in recomputed.items() if k != "llm_kept"} == {
        k: v for k, v in terms.items() if k != "llm_kept"
    }


def test_what_fp16_and_a_cpu_change() -> None:
    fp16 = memory_terms(LLAMA_31_8B, MAPPER, BATCHES[0], "replicated", 4, "fp16")
    assert fp16["mapper_moments"] == 8 * MAPPER.parameters / 4  # DeepSpeed's ZeRO-1, which scales the loss
    assert fp16["bucket"] == 4 * BUCKET
    cpu = memory_terms(SMALL, MAPPER, BATCHES[0], "offload", 2, "fp32", on_cpu=True)
    assert cpu["llm_weights"] == 4 * SMALL.parameters / 2
    assert (cpu["context"], cpu["bucket"]) == (0, 4 * min(BUCKET, MAPPER.parameters))


def test_of_a_large_llm_little_is_gathered_at_once() -> None:
    tiny = Mapper(MapperConfig(widths=[8, 8, 8], layers=1, heads=2, feed_forward=8), 128)
    assert gathered_bytes(SMALL, tiny, 4, "zero3", 2) == 2.5 * 4 * (SMALL.parameters + tiny.parameters)
    assert gathered_bytes(LLAMA_31_8B, MAPPER, 2, "zero3", 2) == 2.5 * 2 * (128_256 * 4096 + 5 * 10**7)
    assert gathered_bytes(LLAMA_31_8B, MAPPER, 2, "zero3", 1) == 0
