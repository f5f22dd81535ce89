"""What is checked: a stage, its config, and the ranks it is asked to run on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from cluster.fit.need import Ranks
from cluster.stages import TRAINING
from cluster.submission import SubmitConfig
from sm_train.data import manifest
from sm_train.models.speech import pick_device
from sm_train.records import Utterance


@dataclass
class Work:
    """A stage, its resolved config, and where it is to run."""

    stage: str
    cfg: Any
    submit: SubmitConfig

    @property
    def is_training(self) -> bool:
        return self.stage in TRAINING

    @property
    def out(self) -> str:
        """The run folder, or the shard set of precompute."""
        return str(getattr(self.cfg, "out", None) or self.cfg.run)

    @property
    def out_folder(self) -> Path | None:
        """The same as a folder; None where it is on an object store."""
        return None if "://" in self.out else Path(self.out)

    @property
    def shard_sets(self) -> list[str]:
        """Those it reads."""
        named = getattr(self.cfg, "shards", None)
        return [] if named is None else [named] if isinstance(named, str) else list(named)

    @property
    def device_name(self) -> str:
        """What the config asks for: auto, cpu, cuda."""
        section = {"precompute": "encoder", "evaluate": "llm"}.get(self.stage, "engine")
        return str(getattr(self.cfg, section).device)

    @property
    def device(self) -> torch.device:
        """The device of this process.

        Raises:
            UserError: there is no such device.
        """
        name = pick_device(self.device_name)
        has_gpu = torch.cuda.is_available()
        return torch.device(name if has_gpu or not name.startswith("cuda") else "cpu")

    @property
    def partitioned_by(self) -> str:
        """The engine that training will take."""
        return str(getattr(self.cfg, "placed", self.cfg.engine).name)

    @property
    def ranks(self) -> Ranks:
        """Those of training; one for the other stages."""
        asked = bool(self.submit.gpus_per_node or self.submit.gpu) or self.device_name.startswith("cuda")
        on_gpus = asked or self.device.type == "cuda"
        count = self.submit.ranks if self.is_training else 1
        return Ranks(count, self.submit.ranks_per_node if self.is_training else 1, on_cpu=not on_gpus)

    @cached_property
    def utterances(self) -> list[Utterance]:
        """The manifest of precompute.

        Raises:
            UserError: it cannot be read.
        """
        return manifest.read_manifest(self.cfg.manifest)
