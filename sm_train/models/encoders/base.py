"""What the families of speech encoders share: their interface, their weights, their padding.

Shape letters: B utterances, T frames, E encoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sm_train.data.audio import SAMPLE_RATE_HZ
from sm_train.data.inputs import Inputs
from sm_train.errors import UserError
from sm_train.models import checkpoints


class Trunk(Protocol):
    """One family's encoder with its lowest layers alone, the weights still to be read."""

    model: nn.Module
    """Holds the weights in use and no others, by the names of the checkpoint."""
    layers: nn.ModuleList
    prefixes: tuple[str, ...]
    """What checkpoints of the family put before those names."""
    inputs: Inputs
    num_layers: int
    """Layers of the whole encoder."""
    width: int
    samples_per_frame: int
    longest_samples: int | None
    minds_padding: bool
    """Frames depend on the padding behind them, for all that attention is masked."""

    def num_frames(self, num_samples: int) -> int:
        """Encoder frames of an utterance."""

    def frames_of(self, prepared: NDArray[np.float32]) -> int:
        """Encoder frames of a prepared utterance."""

    def forward(self, prepared: Sequence[NDArray[np.float32]], device: torch.device, dtype: torch.dtype) -> Any:
        """The encoder's own output [B, T, E] before any adaptor, final norm included."""


class Reached(Exception):
    """The forward pass has come to where the wanted hidden states [B, T, E] go in."""

    def __init__(self, hidden_BTE: torch.Tensor) -> None:
        super().__init__()
        self.hidden_BTE = hidden_BTE


def end_behind(layers: nn.ModuleList) -> None:
    """Let a forward pass end behind the last of these layers, with :class:`Reached`."""

    def reached(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> NoReturn:
        raise Reached(args[0])

    layers.append(nn.Identity())
    layers[-1].register_forward_pre_hook(reached)


def build(model_class: Any, settings: Any) -> Any:
    """A model without weights: nothing is initialised that a checkpoint brings."""
    with torch.device("meta"):
        model = model_class(settings)
    if {name for name, _ in model.named_buffers()} - model.state_dict().keys():
        return model_class(settings)  # a buffer that no checkpoint holds would stay empty on meta
    return model


def read_weights(trunk: Trunk, folder: Path, dtype: torch.dtype, what: str) -> dict[str, torch.Tensor]:
    """Fill the model from a checkpoint, tensor by tensor; returns what was read, as it is stored.

    Raises:
        UserError: a tensor is absent.
    """
    wanted, places = list(trunk.model.state_dict()), checkpoints.weight_map(folder).keys()
    prefix = max(trunk.prefixes, key=lambda prefix: sum(prefix + name in places for name in wanted))
    stored = {name: _stored(prefix + name, places) for name in wanted}
    found = checkpoints.read_tensors(folder, set(stored.values()), what)
    state = {name: found[stored[name]] for name in wanted}
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    trunk.model.load_state_dict(state, strict=True, assign=True)
    return found


def _stored(name: str, places: Any) -> str:
    """A weight norm's two parts go by other names in checkpoints than in torch's modules of today."""
    old = name.replace("parametrizations.weight.original0", "weight_g")
    old = old.replace("parametrizations.weight.original1", "weight_v")
    return name if name in places else old


def read_extractor(extractor_class: Any, folder: Path, what: str) -> Any:
    """A checkpoint's feature extractor.

    Raises:
        UserError: there is none, or it wants another sampling rate.
    """
    try:
        extractor = extractor_class.from_pretrained(folder)
    except OSError:
        raise UserError(f"{what}: the folder has no preprocessor_config.json") from None
    if extractor.sampling_rate != SAMPLE_RATE_HZ:
        raise UserError(f"{what}: its audio is of {extractor.sampling_rate} Hz; {SAMPLE_RATE_HZ} Hz are read here")
    return extractor


def padded(prepared: Sequence[NDArray[np.float32]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Arrays of any lengths as one, zeros behind the shorter ones, and the mask [B, T] of what is real."""
    lengths = [len(array) for array in prepared]
    batch = np.zeros((len(prepared), max(lengths), *prepared[0].shape[1:]), np.float32)
    mask_BT = np.zeros(batch.shape[:2], np.int64)
    for i, array in enumerate(prepared):
        batch[i, : len(array)] = array
        mask_BT[i, : len(array)] = 1
    return torch.from_numpy(batch), torch.from_numpy(mask_BT)
