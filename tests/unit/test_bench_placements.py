"""The bench of placements: its formula against what torch really keeps, and its pure parts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from sm_train import config
from sm_train.errors import UserError
from sm_train.models.mapper import PAPER_PARAMETERS, MapperConfig, SpeechMapper
from tools.bench import (
    BATCHES,
    GPUS,
    LLAMA_31_8B,
    PLACEMENTS,
    Batch,
    Llama,
    Measured,
    memory_of,
    ranks_of,
    started,
)  # fmt: skip
from tools.bench.placements import BenchConfig, main
from tools.bench.predictions import (
    BUCKET,
    CONTEXT_BYTES,
    GIB,
    Mapper,
    gathered_bytes,
    kept_bytes,
    llm_kept,
    measured_table,
    memory_terms,
    predict,
    prediction_table,
    recommend,
    time_terms,
)  # fmt: skip

SMALL = Llama(layers=2, width=128, heads=4, kv_heads=2, feed_forward=384, vocabulary=300)
MAPPER = Mapper(MapperConfig(), 4096)
A100_80, V100 = GPUS[2], GPUS[0]


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


def test_terms_of_time() -> None:
    batch, p = BATCHES[0], LLAMA_31_8B.parameters
    of = {name: time_terms(LLAMA_31_8B, MAPPER, batch, name, 4, A100_80) for name in PLACEMENTS}
    assert of["replicated"]["gathers"] == of["replicated"]["pcie"] == of["zero3"]["pcie"] == 0
    assert of["zero3"]["gathers"] == pytest.approx(4 * (p + MAPPER.parameters) * 0.75 / 240e9)
    assert of["offload"]["pcie"] == pytest.approx(4 * p / 4 / 24e9)
    assert 4 * 0.9 * p * batch.tokens < of["replicated"]["compute"] * 156e12 < 4 * 1.1 * p * batch.tokens
    again = time_terms(LLAMA_31_8B, MAPPER, batch, "zero3", 4, A100_80, recomputed=True)
    assert 1.4 < again["compute"] / of["zero3"]["compute"] < 1.5
    assert time_terms(LLAMA_31_8B, MAPPER, batch, "zero3", 1, A100_80)["gathers"] == 0


def test_gathers_are_as_long_as_the_llm_s_layers_at_t_min() -> None:
    found = predict(A100_80, LLAMA_31_8B, MAPPER, BATCHES[0], "zero3", 4)
    layers_s = 4 * LLAMA_31_8B.layer_parameters * found.min_tokens / 156e12
    assert layers_s == pytest.approx(found.times["gathers"])
    assert found.hidden_s < found.exposed_s


def test_the_fastest_that_fits_is_recommended() -> None:
    def all_of(gpu: object, ranks: int) -> list:  # type: ignore[type-arg]
        return [predict(gpu, LLAMA_31_8B, MAPPER, BATCHES[0], name, ranks) for name in PLACEMENTS]  # type: ignore[arg-type]

    best = recommend(all_of(A100_80, 4))
    assert best is not None
    assert best.placement == "replicated"
    on_v100 = [
        predict(V100, LLAMA_31_8B, MAPPER, BATCHES[1], name, 4, recomputed=name != "replicated") for name in PLACEMENTS
    ]
    assert not on_v100[0].fits
    assert on_v100[0].gib * GIB == sum(on_v100[0].memory.values())
    best = recommend(on_v100)
    assert best is not None
    assert best.placement == "zero3"
    assert recommend([on_v100[0]]) is None


def test_tables_have_a_row_for_each() -> None:
    table = prediction_table(BATCHES[0]).splitlines()
    assert len(table) == 2 + 4 * len(GPUS)
    assert len({line.count("|") for line in table}) == 1
    one = Measured("replicated", 2.0, [700.0, 690.0], [800.0, 790.0], 40.0, [900.0, 900.0], 300.0, 400.0, 1.5)
    other = Measured("zero3", 5.0, [700.0, 690.0], [550.0, 540.0], 40.0, [900.0, 900.0], 300.0, 200.0, 1.5)
    lines = measured_table([one, other]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "| 2.00 s, 1.00x |" in lines[2]
    assert "| 500, 1.00x | 400 | 1.25 |" in lines[2]
    assert "| 5.00 s, 2.50x |" in lines[3]
    assert "| 250, 0.50x |" in lines[3]


def test_a_process_is_looked_at_and_ended(tmp_path: Path) -> None:
    code = "import sys; held = b'x' * 2**26; print('ready', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with started([sys.executable, "-c", code], tmp_path / "log", **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        found = memory_of(process.pid)
        assert found is not None
        assert 64 < found["pss"] < 120
        assert found["peak"] > 64
        assert found["file"] < found["pss"] - 60
        assert ranks_of(process.pid) == {}
    assert process.returncode is not None
    assert memory_of(process.pid) is None


def test_ranks_are_the_children_that_have_one(tmp_path: Path) -> None:
    child = f"subprocess.Popen([{sys.executable!r}, '-c', 'import time; time.sleep(60)'], env={{'RANK': str(rank)}})"
    code = (
        f"import subprocess; ranks = [{child} for rank in (0, 1)]; print(*(r.pid for r in ranks), flush=True)\n"
        "try: input()\nfinally: [r.kill() for r in ranks]"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with started([sys.executable, "-c", code], tmp_path / "log", **pipes) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        until = time.monotonic() + 20
        while (
            len(ranks_of(process.pid)) < 2 and time.monotonic() < until
        ):  # a child has its own environment from exec on
            time.sleep(0.01)
        assert ranks_of(process.pid) == dict(enumerate(pids))
        assert process.stdin is not None
        process.stdin.close()
        process.wait(10)
    assert ranks_of(os.getpid()) == {}


def test_keys(capsys: pytest.CaptureFixture[str]) -> None:
    cfg = config.from_mapping(BenchConfig, {"width": "512", "recomputed": "true", "interval_s": "0.1"}, "test")
    assert (cfg.width, cfg.recomputed, cfg.llm.heads, cfg.llm.kv_heads) == (512, True, 8, 2)
    for wrong in (["width=300"], ["steps=3"], ["show=some"], ["depth=3"], ["width"]):
        with pytest.raises(UserError):
            main(wrong)
    main(["--help"])
    assert "vocabulary" in capsys.readouterr().out
    main(["show=predicted"])
    assert capsys.readouterr().out.count("| A100-40 |") == 8
