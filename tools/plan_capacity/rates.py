"""How fast things go here: each rate with where it comes from."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sm_train import files
from sm_train.errors import UserError
from tools.plan_capacity import formulas
from tools.plan_capacity.corpus import Corpus
from tools.plan_capacity.hardware import MEMORY_GB_S, Batch, Gpu, in_precision, time_terms
from tools.plan_capacity.settings import PlanConfig
from tools.plan_capacity.shapes import Shapes

_MEMORY_REACHED = 0.6
_LEAST_DECODE_S = 0.03
SCHEMA = 1


@dataclass(frozen=True)
class Rate:
    """A number and where it comes from."""

    value: float
    unit: str
    kind: str
    """assumed | published | calibrated"""
    source: str


@dataclass(frozen=True)
class Rates:
    """Everything that a prediction of time multiplies or adds."""

    encode_x: Rate
    decode_x: Rate
    write_mb_s: Rate
    precompute_start_s: Rate
    target_s: Rate
    retarget_start_s: Rate
    pretrain_start_s: Rate
    pretrain_step_s: Rate
    pretrain_frame_s: Rate
    pretrain_valid_x: Rate
    save_s: Rate
    tune_start_s: Rate
    tune_step_s: Rate
    tune_token_s: Rate
    tune_valid_s: Rate
    evaluate_start_s: Rate
    hear_s: Rate
    answer_s: Rate
    cut_answer_s: Rate
    score_s: Rate
    has_links: bool = False
    """Whether steps were measured over several ranks, so that what goes over links is in them."""

    def rows(self) -> list[tuple[str, Rate]]:
        """Every rate by name."""
        return [(name, getattr(self, name)) for name in NAMES]


NAMES = [field.name for field in fields(Rates) if field.name != "has_links"]


def _assumed(value: float, unit: str, source: str) -> Rate:
    return Rate(value, unit, "assumed", source)


def _peak(gpu: Gpu) -> str:
    return f"{gpu.reached:.0%} of {gpu.peak_tflops:g} TFLOP/s (docs/benchmarks.md)"


def assumed(cfg: PlanConfig, shapes: Shapes, corpus: Corpus, gpu: Gpu) -> Rates:
    """Rates of a GPU by formulas, published peaks and assumed shares of them."""
    flop_s, memory = gpu.reached * gpu.peak_tflops * 1e12, MEMORY_GB_S[gpu.name] * 1e9
    mapper, hz, llm = shapes.mapper, shapes.frame_hz, shapes.llm
    first = mapper.multiplications - mapper.parameters
    encoder = formulas.encoder_flop_per_s(
        cfg.encoder_parameters, shapes.precompute.encoder.layer, shapes.width, corpus.mean_s
    )
    frame_flop = formulas.mapper_flop_per_s(first, mapper.parameters - first, hz) / hz
    first_gpu, second_gpu = (in_precision(gpu, stage.engine.precision) for stage in (shapes.pretrain, shapes.tune))
    first_flop_s = first_gpu.reached * first_gpu.peak_tflops * 1e12
    batch, item_bytes = shapes.evaluate.batch_size, 4 if shapes.evaluate.llm.dtype == "float32" else 2
    token_s = formulas.decoding_s(item_bytes * llm.parameters, _MEMORY_REACHED * memory, _LEAST_DECODE_S)
    positions, answer = round(corpus.mean_s * hz / 4), round(corpus.tokens) + 1
    row = round(corpus.prompt_tokens) + positions + answer
    prompt_s = 2 * llm.layer_parameters * row / flop_s
    recomputed = shapes.tune.checkpoint_activations
    one = time_terms(llm, mapper, Batch(1, row, positions, answer), "replicated", 1, second_gpu, recomputed=recomputed)
    decoded = f"the LLM's bytes through {_MEMORY_REACHED:.0%} of the memory's bandwidth, at least {_LEAST_DECODE_S:g} s"
    start = "loading; a guess"
    return Rates(
        encode_x=Rate(
            formulas.times_real_time(cfg.encoder_share * gpu.peak_tflops * 1e12, encoder), "x real time", "published",
            f"{cfg.encoder_share:.0%} of peak: Parakeet 1.1B's RTFx 2,728 on an A100, end to end (arXiv 2510.06961)",
        ),
        decode_x=_assumed(cfg.decode_x, "x real time a CPU thread", "measured on the reference CPU (docs/capacity.md)"),
        write_mb_s=_assumed(cfg.write_mb_s, "MB/s a writer", "measured on the reference disk (docs/benchmarks.md)"),
        precompute_start_s=_assumed(60, "s", start),
        target_s=_assumed(2e-4, "s an utterance", "its tasks included, as on the reference CPU"),
        retarget_start_s=_assumed(30, "s", start),
        pretrain_start_s=_assumed(30, "s", start),
        pretrain_step_s=_assumed(
            formulas.adam_s(mapper.parameters, memory), "s a step", "AdamW: 30 bytes a parameter at the memory's peak"
        ),
        pretrain_frame_s=_assumed(frame_flop / first_flop_s, "s a padded frame", _peak(first_gpu)),
        pretrain_valid_x=_assumed(
            3 * first_flop_s / (frame_flop * hz) / 2, "x real time", "forward, half as efficient"
        ),
        save_s=_assumed(0.39 * mapper.parameters / 277e6, "s", "the paper's mapper here (docs/benchmarks.md)"),
        tune_start_s=_assumed(120, "s", start),
        tune_step_s=_assumed(formulas.adam_s(mapper.parameters, memory), "s a step", "as pretrain_step_s"),
        tune_token_s=_assumed(one["compute"] / row, "s a padded token, mapper and head included", _peak(second_gpu)),
        tune_valid_s=_assumed(prompt_s, "s an utterance", "forward"),
        evaluate_start_s=_assumed(120, "s", start),
        hear_s=_assumed(0.02, "s an utterance and mapper", "launches of one forward; a guess"),
        answer_s=_assumed(prompt_s + (corpus.tokens + 1) * token_s / batch, "s an answer", decoded),
        cut_answer_s=_assumed(
            prompt_s + shapes.evaluate.max_new_tokens * token_s / batch, "s an answer of max_new_tokens", decoded
        ),
        score_s=_assumed(1e-3, "s a hypothesis", "as on the reference CPU"),
    )  # fmt: skip


def facts(cfg: PlanConfig, shapes: Shapes) -> dict[str, Any]:
    """What calibrated rates hold for: another model or batch has others."""
    train = {
        "encoder": [shapes.precompute.encoder.path, shapes.precompute.encoder.layer, shapes.precompute.encoder.dtype],
        "mapper": [*shapes.pretrain.mapper.widths, shapes.pretrain.mapper.layers],
        "llm": shapes.evaluate.llm.path,
        "precision": [shapes.pretrain.engine.precision, shapes.tune.engine.precision],
        "placement": shapes.tune.placement,
        "lanes": [shapes.pretrain.batch.lanes, shapes.tune.batch.lanes],
        "batch_size": shapes.evaluate.batch_size,
        "max_new_tokens": shapes.evaluate.max_new_tokens,
    }
    return {"gpu": cfg.gpu, "gpus": cfg.gpus, **train}


def load(path: Path, cfg: PlanConfig, shapes: Shapes) -> Rates:
    """Rates that calibrate wrote.

    Raises:
        UserError: the file is no such file, or was measured with something else.
    """
    said = files.read_object(path)
    wanted = facts(cfg, shapes)
    if said.get("schema") != SCHEMA or not isinstance(said.get("rates"), dict):
        raise UserError(f"{path} holds no rates; python -m tools.plan_capacity.calibrate writes them")
    for name, value in wanted.items():
        found = said.get("facts", {}).get(name)
        if found != value and not (name == "gpus" and cfg.gpu != "cpu"):
            raise UserError(f"{path}: {name} was {found!r} when it was measured, and is {value!r} now; calibrate again")
    if missing := [name for name in NAMES if name not in said["rates"]]:
        raise UserError(f"{path} lacks the rate {missing[0]}; calibrate again")
    found = {name: Rate(**said["rates"][name]) for name in NAMES}
    return Rates(**found, has_links=said["facts"]["gpus"] > 1)
