"""MosaicML streaming, imported as this environment lets it be."""

from __future__ import annotations

import sys
import types

# It imports torchvision, which it needs for image data sets alone and which breaks a CPU torch.
sys.modules.setdefault("streaming.vision", types.ModuleType("streaming.vision"))

import streaming  # noqa: E402

__all__ = ["streaming"]
