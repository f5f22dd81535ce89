"""Low-rank adapters of the LLM (LoRA, arXiv 2106.09685): what joint training adds to the projector, by peft.

The LLM's own weights stay as they are; an adapter is two files beside the mapper's, in peft's format.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sm_train import config, files
from sm_train.errors import UserError
from sm_train.models.mapper import SpeechMapper

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "adapter."
"""What a checkpoint's tensors of the adapter are called before their names in peft's format."""
_PEFT = "base_model.model."
_NAME = "speech"


@dataclass(frozen=True)
class AdapterConfig:
    """A low-rank adapter of some linear layers."""

    rank: int = config.key(0, "rank of the LLM's low-rank adapter, trained with the mapper; 0 leaves the LLM as it is")
    alpha: float = config.key(16.0, "the adapter's output is multiplied by alpha / rank")
    dropout: float = config.key(0.0, "dropout before the adapter")
    modules: list[str] = config.key(
        ["q_proj", "k_proj", "v_proj", "o_proj"], "linear layers it is beside, by the last part of their names"
    )

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"lora.rank is {self.rank}; it must be 0 or more")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout:g}; it must lie in [0, 1)")
        if self.rank and not self.modules:
            raise ValueError("lora.modules is empty; name linear layers of the LLM, as q_proj")

    def description(self, llm: str) -> dict[str, Any]:
        """``adapter_config.json`` in peft's format."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": llm,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": sorted(self.modules),
            "bias": "none",
            "inference_mode": True,
        }


def add(llm: Any, description: Mapping[str, Any], name: str = _NAME) -> None:
    """Put an adapter beside the LLM's layers, in place; its own weights alone ask for gradients.

    Raises:
        UserError: the LLM has none of the layers, or peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise UserError(f"an adapter of the LLM needs peft ({error}): pip install peft") from None
    fields = {key: description[key] for key in ("r", "lora_alpha", "lora_dropout", "target_modules")}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are meant
            inject_adapter_in_model(LoraConfig(**fields), llm, adapter_name=name)
    except ValueError as error:
        raise UserError(f"lora.modules {fields['target_modules']}: {str(error).splitlines()[0]}") from None


class WithAdapter(nn.Module):
    """What joint training trains: a mapper and an LLM's adapter, as one module under a checkpoint's names.

    Raises:
        UserError: the adapter is beside layers that are not linear.
    """

    def __init__(self, mapper: SpeechMapper, llm: Any) -> None:
        super().__init__()
        self.mapper = mapper
        # Its layers live inside the LLM; here they are found by those who cast or count what is trained.
        self.layers = nn.ModuleList(module for module in llm.modules() if _is_part(module))
        self._names = {id(tensor): name for name, tensor in _tensors(llm, _NAME).items()}
        trained = {id(parameter) for parameter in llm.parameters() if parameter.requires_grad}
        if not trained or trained != {id(parameter) for parameter in self.layers.parameters()}:
            raise UserError("lora.modules must all be linear layers of the LLM, as q_proj; an embedding is none")

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The mapper's by their own names, then the adapter's by :data:`PREFIX` and peft's."""
        yield from self.mapper.named_parameters()
        for parameter in self.layers.parameters():
            yield PREFIX + self._names[id(parameter)], parameter


def train(llm: Any, mode: bool) -> None:
    """The adapter's dropout at work or not; the LLM stays as it is."""
    for module in llm.modules():
        if _is_part(module):
            module.train(mode)


def split(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the mapper's, the adapter's in peft's names) of a checkpoint's tensors."""
    of_adapter = {name.removeprefix(PREFIX): t for name, t in weights.items() if name.startswith(PREFIX)}
    return {name: t for name, t in weights.items() if not name.startswith(PREFIX)}, of_adapter


def read(checkpoint: Path) -> dict[str, Tensor]:
    """The adapter's tensors of a checkpoint folder under a checkpoint's names; none where it has no adapter."""
    found = load_file(checkpoint / WEIGHTS) if (checkpoint / WEIGHTS).exists() else {}
    return {PREFIX + name: tensor for name, tensor in found.items()}


def folder_of(checkpoint: Path) -> Path | None:
    """A checkpoint folder that holds an adapter; None for one without."""
    return checkpoint if (checkpoint / WEIGHTS).exists() else None


class Adapters:
    """The adapters that an LLM has been given at inference; each is read once, and one at most is at work."""

    def __init__(self, llm: Any) -> None:
        self._llm, self._names = llm, dict[Path, str]()

    @contextmanager
    def at_work(self, folder: Path | None) -> Iterator[None]:
        """The LLM with the adapter of a folder inside; without any, where there is none.

        Raises:
            UserError: the folder holds no adapter of this LLM.
        """
        if folder is None:
            yield
            return
        name = self._names.get(folder) or self._read(folder)
        try:
            self._switch(name)
            yield
        finally:
            self._switch(None)

    def _read(self, folder: Path) -> str:
        name = f"{_NAME}{len(self._names)}"
        try:
            tensors = load_file(folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder} holds no adapter: {error}") from None
        add(self._llm, files.read_json(folder / CONFIG), name)
        own = _tensors(self._llm, name)
        if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in tensors.items()}:
            raise UserError(
                f"{folder}: its adapter was made for another LLM; evaluate it with the one it was tuned for"
            )
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(tensors[key])
        self._llm.requires_grad_(False)
        self._names[folder] = name
        return name

    def _switch(self, name: str | None) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        for module in self._llm.modules():
            if isinstance(module, BaseTunerLayer):
                module.enable_adapters(name is not None)
                if name is not None:
                    module.set_adapter(name)
        self._llm.requires_grad_(False)


def _is_part(module: nn.Module) -> bool:
    """Whether a module is a dictionary of an adapter's layers by adapter name."""
    return isinstance(module, nn.ModuleDict) and set(module) == {_NAME}


def _tensors(llm: Any, name: str) -> dict[str, Tensor]:
    """An adapter's parameters in peft's names."""
    found = {}
    for key, parameter in llm.named_parameters():
        if f".{name}." in key and ".lora_" in key:
            found[_PEFT + key.replace(f".{name}.", ".")] = parameter
    return found
