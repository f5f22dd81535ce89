"""Hashes of tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import xxhash


def tensors_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """The xxh3 of names and bytes of some tensors, in the order of their names."""
    hasher = xxhash.xxh3_64()
    for name in sorted(tensors):
        hasher.update(name.encode())
        hasher.update(tensors[name].detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return str(hasher.hexdigest())
