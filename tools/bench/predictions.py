"""Step time of stage 2 by placement, beside the memory that :mod:`cluster.fit.memory` says; none was measured on a GPU.

P: parameters of the frozen LLM; N: of the mapper; W: GPUs; s: bytes of a weight; T: tokens of a micro-batch, padding
included; D, V: width and vocabulary of the LLM.

A step is one micro-batch a GPU and one update: compute = (4, or 6 recomputed) x layer parameters x T + 4 V D x answer
places + 6 x the mapper's multiplications; gathers = 2 s (P + N) (W - 1) / W over the link; offload also reads 2 s P / W
over PCIe. Hidden gathers make it the largest of these, exposed ones the sum; the truth lies in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.fit.gpus import GPUS, LINK_REACHED, PCIE_REACHED, Gpu
from cluster.fit.memory import GIB, LLAMA_31_8B, MARGIN, Batch, Llama, Mapper, memory_terms
from sm_train.models.mapper import MapperConfig
from tools.bench import PLACEMENTS, Measured


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
