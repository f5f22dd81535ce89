"""What is trained, one file an objective; the loop knows this protocol only."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sm_train.data.batches import Columns


class Objective(Protocol):
    """A module whose loss is the sum over terms of weight * sum / count, counts taken over all lanes of a step."""

    weights: dict[str, float]
    measures: tuple[str, ...]
    """Terms that are only logged, each as its sum over its count."""

    def counts(self, columns: Columns) -> dict[str, NDArray[np.int64]]:
        """How much of each term each item holds."""

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        """The sums by term of a micro-batch."""
