"""GPUs and the shapes that formulas speak of: the one place of this package that knows where those are kept."""

from __future__ import annotations

from dataclasses import replace

from cluster.fit.gpus import GPUS, LINK_REACHED, Gpu
from cluster.fit.memory import GIB, MARGIN, Batch, Llama, Mapper, pretrain_terms
from cluster.fit.shapes import read_shape
from sm_train.errors import UserError
from tools.bench import PLACEMENTS
from tools.bench.predictions import Prediction, predict, time_terms

__all__ = [
    "GIB", "LINK_REACHED", "MARGIN", "MEMORY_GB_S", "PLACEMENTS", "Batch", "Gpu", "Llama", "Mapper", "Prediction",
    "across", "find", "in_precision", "predict", "pretrain_terms", "read_shape", "time_terms",
]  # fmt: skip

CPU = Gpu("cpu", 1e9, "fp32", peak_tflops=0.1, reached=1.0, link_gb_s=1.0, pcie_gb_s=10.0)
"""About 100 GFLOP/s that a core's matrix products really reach: an order of magnitude, to be calibrated."""
KNOWN = {gpu.name: gpu for gpu in (*GPUS, CPU)}
MEMORY_GB_S = {"V100-32": 900.0, "A100-40": 1555.0, "A100-80": 2039.0, "H100-80": 3350.0, "cpu": 10.0}
"""Peak, NVIDIA data sheets."""


FP32_TFLOPS = {"V100-32": 15.7, "A100-40": 19.5, "A100-80": 19.5, "H100-80": 67.0}
"""Peak without TF32, which torch does not take by default; NVIDIA data sheets."""


def find(name: str) -> Gpu:
    """A GPU by name.

    Raises:
        UserError: it is not known.
    """
    if name not in KNOWN:
        raise UserError(f"gpu is {name!r}; those known are {', '.join(KNOWN)}")
    return KNOWN[name]


def in_precision(gpu: Gpu, precision: str) -> Gpu:
    """The GPU with the peak that it has in an engine's precision; the cpu's is one for all."""
    if gpu.name == CPU.name or precision == gpu.precision:
        return gpu
    if precision == "fp32":
        return replace(gpu, precision=precision, peak_tflops=FP32_TFLOPS[gpu.name])
    return replace(gpu, precision=precision)  # fp16 and bf16 go equally fast


def across(gpu: Gpu, ranks: int, gpus_per_node: int, network_gb_s: float) -> Gpu:
    """The GPU with the link that a ring of so many ranks has: beyond one node, the network if that is slower."""
    return replace(gpu, link_gb_s=min(gpu.link_gb_s, network_gb_s)) if ranks > gpus_per_node else gpu
