"""Published figures of GPUs, and the share of each that is assumed to be reached."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """Published figures of a GPU, and the share of each that is assumed to be reached."""

    name: str
    memory_gib: float
    """As torch reports it."""
    precision: str
    peak_tflops: float
    """Dense, in this precision."""
    reached: float
    link_gb_s: float
    """NVLink to the node's other GPUs, one way."""
    pcie_gb_s: float
    """Peak, one way."""


LINK_REACHED, PCIE_REACHED = 0.8, 0.75
GPUS = (
    Gpu("V100-32", 31.7, "fp16", 125, 0.5, 150, 16),
    Gpu("A100-40", 39.4, "bf16", 312, 0.5, 300, 32),
    Gpu("A100-80", 79.2, "bf16", 312, 0.5, 300, 32),
    Gpu("H100-80", 79.1, "bf16", 989, 0.4, 450, 64),
)
