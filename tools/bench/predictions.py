"""Memory and step time of stage 2 by placement, by one formula; nothing here was measured on a GPU.

P: parameters of the frozen LLM; N: of the mapper; W: GPUs; s: bytes of a weight; T: tokens of a micro-batch, padding
included; D, F, H: width, feed-forward width and heads of the LLM. Bytes on one GPU, by term (:func:`memory_terms`):

    llm_weights     s P (replicated), s P / W (zero3), none (offload, which has s P / W in host memory)
    gathered        zero3 and offload: s (2 + 1 / W) min(P + N, max(largest tensor, reuse / 2) + prefetch)
    mapper          weights s N, fp32 masters 4 N, two moments 8 N, fp32 gradient 4 N; what is sharded, by engine
    bucket          deepspeed: fp32 room for gradients on their way, 5e7 elements whether they are needed or not
    llm_kept        T x layers x (8 D + 4 s D + 3 s F + 4 H + 8) + the last norm: see :func:`kept_bytes`
    mapper_kept     inputs, as all its weights are trained
    logits          (s + 12) bytes x answer places x V: s, fp32, those asked for, their log-softmax (in fp32 the
                    first two are one)
    context         CUDA, NCCL and workspaces: assumed

A step is one micro-batch a GPU and one update: compute = (4, or 6 recomputed) x layer parameters x T + 4 V D x answer
places + 6 x the mapper's multiplications; gathers = 2 s (P + N) (W - 1) / W over the link; offload also reads 2 s P / W
over PCIe. Hidden gathers make it the largest of these, exposed ones the sum; the truth lies in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sm_train.models.mapper import MapperConfig, SpeechMapper
from sm_train.train.engines.deepspeed import BUCKET, REUSE
from tools.bench import GPUS, LINK_REACHED, LLAMA_31_8B, PCIE_REACHED, PLACEMENTS, Batch, Gpu, Llama, Measured

GIB = 2**30
PREFETCH = 5 * 10**7
"""Elements: DeepSpeed 0.19's stage3_prefetch_bucket_size."""
CONTEXT_BYTES = 1.5 * GIB
MARGIN = 0.95
"""Share of a GPU's memory that may be filled: the allocator's fragments take the rest. Assumed."""


class Mapper:
    """What of a mapper the formula needs."""

    def __init__(self, cfg: MapperConfig, output_width: int) -> None:
        with torch.device("meta"):
            module = SpeechMapper(cfg, cfg.widths[0], output_width)
        self.cfg, self.parameters = cfg, module.num_parameters
        first = sum(p.numel() for p in module.blocks[0].parameters())
        self.multiplications = self.parameters + first
        """Of one position: the first block sees two frames of it."""

    def kept_bytes(self, item_bytes: int, mask_bytes: int) -> float:
        """Bytes that one position keeps for the backward; ``mask_bytes`` of an entry of a dropout mask."""
        first, second, last = self.cfg.widths
        feed_forward = self.cfg.feed_forward
        total = float(item_bytes * 3 * last)
        for frames, width in ((2, first), (1, second)):
            layer = item_bytes * (8 * width + 2 * feed_forward) + mask_bytes * (2 * width + feed_forward)
            total += frames * (self.cfg.layers * layer + item_bytes * 4 * width)
        return total


def kept_bytes(llm: Llama, row_tokens: int, item_bytes: int, *, keeps_inputs: bool) -> float:
    """Bytes that one token keeps in one layer of a frozen Llama under SDPA, for the backward.

    Frozen linears keep nothing but their weight. Two norms keep their input in fp32 (8 D) and a scale (8); attention
    keeps q, k, v and its output, k and v repeated for every head (4 s D), a row's scale (4 H) and its line of the mask
    (s L); the feed-forward keeps gate, silu(gate) and up (3 s F).

    Args:
        keeps_inputs: DeepSpeed's ZeRO-3 linear keeps its input though the weight is frozen: both norms' outputs (2 s D)
            and the product that goes down (s F); the input of o_proj is attention's output and there already.
    """
    norms, attention = 8 * llm.width + 8, item_bytes * (4 * llm.width + row_tokens) + 4 * llm.heads
    inputs = item_bytes * (2 * llm.width + llm.feed_forward) if keeps_inputs else 0
    return norms + attention + 3 * item_bytes * llm.feed_forward + inputs


def llm_kept(llm: Llama, batch: Batch, item_bytes: int, *, keeps_inputs: bool, recomputed: bool) -> float:
    """Bytes that a micro-batch keeps in the LLM; recomputed: each layer's input, and one layer whole."""
    layer = kept_bytes(llm, batch.row_tokens, item_bytes, keeps_inputs=keeps_inputs)
    layers = llm.layers * item_bytes * llm.width + layer if recomputed else llm.layers * layer
    return batch.tokens * (layers + 4 * llm.width + 4 + (item_bytes * llm.width if keeps_inputs else 0))


def gathered_bytes(llm: Llama, mapper: Mapper, item_bytes: int, placement: str, ranks: int) -> float:
    """Bytes of whole weights that are there at once; what is used again within the reuse distance is not let go."""
    if placement == "replicated" or (placement == "zero3" and ranks == 1):  # one rank's part is the whole
        return 0.0
    window = max(llm.vocabulary * llm.width, REUSE // 2) + PREFETCH
    # A gather has the rank's parts in a row, everyone's parts in a row, and the weights copied out of these.
    return item_bytes * (2 + 1 / ranks) * min(llm.parameters + mapper.parameters, window)


def memory_terms(
    llm: Llama, mapper: Mapper, batch: Batch, placement: str, ranks: int, precision: str, *, recomputed: bool = False,
    on_cpu: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Bytes of one rank at the turn from forward to backward, by term.

    Args:
        on_cpu: what was waiting in host memory is here; a replicated LLM in the bf16 of its file is mapped, each
            rank counts its share; a buffer counts where it is written; nothing is dropped out; imports count apart.
    """
    item_bytes, partitioned = 4 if precision == "fp32" else 2, placement != "replicated"
    frozen, trained = item_bytes * llm.parameters, mapper.parameters
    shards = ranks if partitioned or precision == "fp16" else 1  # of masters and moments
    gradient = 4 * trained / ranks if partitioned else 4 * trained * (1 + 1 / ranks if precision == "fp16" else 1)
    uses_deepspeed = partitioned or precision == "fp16"
    is_here = placement != "offload" or on_cpu
    return {
        "llm_weights": frozen / (ranks if partitioned or (on_cpu and precision == "bf16") else 1) if is_here else 0.0,
        "gathered": gathered_bytes(llm, mapper, item_bytes, placement, ranks),
        "mapper_weights": item_bytes * trained / (ranks if partitioned else 1) if is_here else 0.0,
        "mapper_masters": 4 * trained / shards,
        "mapper_moments": 8 * trained / shards,
        "mapper_gradient": gradient,
        "bucket": 4 * (min(trained, BUCKET) if on_cpu else BUCKET) if uses_deepspeed else 0.0,
        "llm_kept": llm_kept(llm, batch, item_bytes, keeps_inputs=partitioned, recomputed=recomputed),
        "mapper_kept": batch.items * batch.positions * mapper.kept_bytes(item_bytes, 0 if on_cpu else 1),
        "logits": (12 if item_bytes == 4 else item_bytes + 12) * batch.items * batch.answer * llm.vocabulary,
        "context": 0.0 if on_cpu else CONTEXT_BYTES,
    }  # fmt: skip


def time_terms(
    llm: Llama, mapper: Mapper, batch: Batch, placement: str, ranks: int, gpu: Gpu, *, recomputed: bool = False
) -> dict[str, float]:
    """Seconds of one step of one micro-batch a GPU, by term; ``update`` is the mapper's gradient on its way."""
    flop = (6 if recomputed else 4) * llm.layer_parameters * batch.tokens
    flop += 4 * llm.vocabulary * llm.width * batch.items * batch.answer
    flop += 6 * mapper.multiplications * batch.items * batch.positions
    link, away = LINK_REACHED * gpu.link_gb_s * 1e9, (ranks - 1) / ranks
    partitioned = placement != "replicated"
    return {
        "compute": flop / (gpu.reached * gpu.peak_tflops * 1e12),
        "gathers": 2 * 2 * (llm.parameters + mapper.parameters) * away / link if partitioned else 0.0,
        "pcie": 2 * 2 * llm.parameters / ranks / (PCIE_REACHED * gpu.pcie_gb_s * 1e9)
        if placement == "offload"
        else 0.0,
        "update": (1 if partitioned else 2) * 4 * mapper.parameters * away / link,
    }


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one placement is predicted to need on one GPU of W."""

    placement: str
    recomputed: bool
    memory: dict[str, float]
    """Bytes, by term."""
    times: dict[str, float]
    """Seconds, by term."""
    host_bytes: float
    """Of the LLM in host memory, the whole node's."""
    fits: bool
    min_tokens: float
    """T_min: tokens of a micro-batch above which what is brought in is hidden behind the compute."""

    @property
    def gib(self) -> float:
        return sum(self.memory.values()) / GIB

    @property
    def hidden_s(self) -> float:
        """A step whose transfers all hide behind the compute, or the other way round."""
        return max(self.times[name] for name in ("compute", "gathers", "pcie")) + self.times["update"]

    @property
    def exposed_s(self) -> float:
        """A step in which nothing overlaps."""
        return sum(self.times.values())


def predict(
    gpu: Gpu, llm: Llama, mapper: Mapper, batch: Batch, placement: str, ranks: int, *, recomputed: bool = False
) -> Prediction:
    """Memory and step time of one placement, by the formula above."""
    memory = memory_terms(llm, mapper, batch, placement, ranks, gpu.precision, recomputed=recomputed)
    times = time_terms(llm, mapper, batch, placement, ranks, gpu, recomputed=recomputed)
    token_s = (6 if recomputed else 4) * llm.layer_parameters / (gpu.reached * gpu.peak_tflops * 1e12)
    min_tokens = max(times["gathers"], times["pcie"]) / token_s
    host = 2.0 * llm.parameters if placement == "offload" else 0.0
    fits = sum(memory.values()) <= MARGIN * gpu.memory_gib * GIB
    return Prediction(placement, recomputed, memory, times, host, fits, min_tokens)


def recommend(predictions: list[Prediction]) -> Prediction | None:
    """The one that fits and is fastest with nothing hidden; None if none fits."""
    return min((one for one in predictions if one.fits), key=lambda one: one.exposed_s, default=None)


def prediction_table(batch: Batch, gpus: Sequence[Gpu] = GPUS, llm: Llama = LLAMA_31_8B) -> str:
    """Every GPU and number of GPUs with one micro-batch, activations kept or recomputed, as Markdown."""
    mapper, both = Mapper(MapperConfig(), llm.width), (False, True)
    heads = [f"{name}, GiB: kept / recomputed" for name in PLACEMENTS] + ["recommended", "its step", "zero3", "offload"]
    lines = [f"| GPU | W | {' | '.join(heads)} | T_min |", "|---" * 10 + "|"]
    for gpu, ranks in ((gpu, ranks) for gpu in gpus for ranks in (1, 2, 4, 8)):
        found = {(p, r): predict(gpu, llm, mapper, batch, p, ranks, recomputed=r) for p in PLACEMENTS for r in both}
        cells = [
            " / ".join(f"{one.gib:.1f}{'' if one.fits else ' no'}" for one in (found[placement, r] for r in both))
            for placement in PLACEMENTS
        ]
        base, best = found["replicated", False].hidden_s, recommend(list(found.values()))
        cells.append(best.placement + (", recomputed" if best.recomputed else "") if best else "none")
        cells.append(f"{1e3 * best.hidden_s:.0f} ms, {span(best, base)}" if best else "")
        cells += [span(found[placement, False], base) for placement in ("zero3", "offload")]
        lines.append(f"| {gpu.name} | {ranks} | {' | '.join(cells)} | {found['zero3', False].min_tokens:,.0f} |")
    return "\n".join(lines)


def span(one: Prediction, base_s: float) -> str:
    """A step over another's, transfers hidden to exposed."""
    ratios = list(dict.fromkeys(f"{seconds / base_s:.2f}x" for seconds in (one.hidden_s, one.exposed_s)))
    return " to ".join(ratios)


def measured_table(runs: Sequence[Measured]) -> str:
    """What was measured beside what was predicted, ratios to the first run's, as Markdown."""
    heads = ["placement", "step", "resident in the steps, MiB by rank", "most", "of it files", "peak with loading"]
    heads += ["baseline", "added: most - baseline", "predicted", "measured / predicted", "last loss"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for run in runs:
        sizes = [", ".join(f"{mib:,.0f}" for mib in each) for each in (run.resident, run.most, run.peak)]
        step, added = run.step_s / runs[0].step_s, run.added / runs[0].added
        cells = [run.placement, f"{run.step_s:.2f} s, {step:.2f}x", *sizes[:2], f"{run.mapped:,.0f}", sizes[2]]
        cells += [f"{run.baseline:,.0f}", f"{run.added:,.0f}, {added:.2f}x", f"{run.predicted:,.0f}"]
        lines.append(f"| {' | '.join([*cells, f'{run.added / run.predicted:.2f}', f'{run.loss:.7g}'])} |")
    return "\n".join(lines)
