"""The mappers that runs left: whether they belong to these models, what each is called, how each is heard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sm_train import files
from sm_train.data.mds import file_digest
from sm_train.data.shards import require_same
from sm_train.data.target_set import TargetTable
from sm_train.errors import UserError
from sm_train.models import adapter
from sm_train.models.llm import FrozenLlm
from sm_train.models.mapper import SpeechMapper
from sm_train.scoring.systems import Mapped

STAGE_1 = "stage 1"
SCRATCH = "scratch"
"""What a run that began with no mapper has as its ``mapper_hash``."""
TUNED_TRIM = "none"
"""Tuning puts every position in the prompt, so a tuned mapper is heard that way too."""
_OF_TRAINING = ("moments", "state")
_FROZEN = ("encoder_hash", "layer", "pool", "tokenizer_hash", "pad_id")
_TUNE = "tune"
_RENDERED = "rendered."
_TASKS = ("asr", "st", "sqa")


@dataclass(frozen=True, slots=True)
class Trained:
    """A checkpoint folder of a run, with what its mapper was trained on."""

    run: Path
    folder: Path
    contract: Mapping[str, Any]
    name: str
    """As it is called in results and report."""

    @property
    def is_tuned(self) -> bool:
        return self.contract.get("stage") == _TUNE

    @property
    def has_text_alone(self) -> bool:
        """Whether tuning put the text's positions alone in the prompt."""
        return bool(self.contract.get("splice", "all") == "text")

    def digests(self) -> dict[str, str]:
        """Of every file of the checkpoint that answers follow from, by name."""
        found = (path for pattern in ("*.safetensors", "*.json") for path in self.folder.glob(pattern))
        return {path.name: file_digest(path) for path in sorted(found) if path.stem not in _OF_TRAINING}

    def as_system(self, targets: TargetTable, trim: str, device: torch.device) -> Mapped:
        """The mapper, loaded; ``trim`` says where the positions of a mapper end that was not tuned with all of them."""
        trim = TUNED_TRIM if self.is_tuned and not self.has_text_alone else trim
        mapper, of_llm = SpeechMapper.from_pretrained(self.folder), adapter.folder_of(self.folder)
        return Mapped(mapper, targets, trim, device, self.name, of_llm)

    def require_frozen(self, read_here: Mapping[str, Any]) -> None:
        """Raises UserError unless features and targets come from the frozen models that the mapper was trained for."""
        fields = [name for name in _FROZEN if name in self.contract]
        require_same(
            {name: read_here[name] for name in fields},
            {name: self.contract[name] for name in fields},
            str(self.folder),
            "use features and targets of the encoder and LLM that the mapper was trained for",
        )

    def require_template(self, llm: FrozenLlm, remedy: str) -> None:
        """Raises UserError unless the LLM's template makes of each prompt of the tuning what it made then."""
        if self.contract.get("llm_hash", llm.fingerprint) != llm.fingerprint:
            raise UserError(
                f"{self.folder}: this mapper was tuned against other weights than LLM {llm.path}'s; {remedy}"
            )
        for key, then in self.contract.items():
            if not key.startswith(_RENDERED):
                continue
            message = key.removeprefix(_RENDERED)
            if [list(ids) for ids in llm.chat.halves(message)] != then:
                raise UserError(
                    f"{self.folder}: the template of LLM {llm.path} renders the prompt {message!r} otherwise than when "
                    f"this mapper was tuned; {remedy}"
                )


def read(run: Path, folder: Path) -> Trained:
    """A run's checkpoint folder, named by its contract: "stage 1", "stage 2 ASR/SQA-CE", "joint ASR-CE+MSE + LoRA".

    Raises:
        UserError: its state.json is missing or damaged.
    """
    contract: dict[str, Any] = files.read_json(folder / "state.json")["contract"]
    if contract.get("stage") != _TUNE:
        return Trained(run, folder, contract, STAGE_1)
    tasks = sorted((task for task, weight in contract["tasks"].items() if weight > 0), key=_order)
    loss = "CE+MSE" if contract["objective.sigma"] > 0 else "CE"
    began = "joint" if contract.get("mapper_hash") == SCRATCH else "stage 2"
    text = ", text alone" if contract.get("splice", "all") == "text" else ""
    lora = " + LoRA" if contract.get("lora.rank") else ""
    return Trained(run, folder, contract, f"{began} {'/'.join(tasks).upper()}-{loss}{text}{lora}")


def read_all(checkpoints: Sequence[tuple[Path, Path]]) -> list[Trained]:
    """Every (run, checkpoint folder); those of one name have their run folder's behind it, in brackets.

    Raises:
        UserError: a run is there twice, or a state.json is missing or damaged.
    """
    trained = [read(run, folder) for run, folder in checkpoints]
    runs = [one.run.resolve() for one in trained]
    if twice := [run for run, times in Counter(runs).items() if times > 1]:
        raise UserError(f"run {twice[0]} is to be evaluated twice; name each run once, as run or in tuned")
    named, alike = Counter(one.name for one in trained), Counter(run.name for run in runs)
    return [
        replace(one, name=f"{one.name} ({run.name if alike[run.name] == 1 else run})") if named[one.name] > 1 else one
        for one, run in zip(trained, runs, strict=True)
    ]


def _order(task: str) -> tuple[int, str]:
    """asr, st, st-LANG, sqa, then any other."""
    kind = task.partition("-")[0]
    return (_TASKS.index(kind) if kind in _TASKS else len(_TASKS), task)
