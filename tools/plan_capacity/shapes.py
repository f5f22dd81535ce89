"""What the stages' own configs say: batches, steps, models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sm_train import config
from sm_train.encoding.settings import PrecomputeConfig
from sm_train.errors import UserError
from sm_train.evaluate import EvaluateConfig
from sm_train.models.speech import ENCODER_FRAME_RATE_HZ
from sm_train.pretrain import PretrainConfig
from sm_train.tune import TuneConfig
from tools.plan_capacity.hardware import Llama, Mapper, read_shape
from tools.plan_capacity.settings import PlanConfig, Stage

C = TypeVar("C")
_LLAMA = ("layers", "width", "heads", "kv_heads", "feed_forward", "vocabulary")


@dataclass(frozen=True)
class Shapes:
    """The stages' configs, and the sizes of the models that they name."""

    precompute: PrecomputeConfig
    pretrain: PretrainConfig
    tune: TuneConfig
    evaluate: EvaluateConfig
    mapper: Mapper
    llm: Llama
    llm_folder: Path | None
    """Where the LLM lies; None for a repository that was not looked for."""

    @property
    def frame_hz(self) -> float:
        """Stored frames a second."""
        return ENCODER_FRAME_RATE_HZ / self.precompute.encoder.pool

    @property
    def width(self) -> int:
        """E, of the features."""
        return self.pretrain.mapper.widths[0]

    @property
    def systems(self) -> int:
        """Mapped systems of the evaluation: stage 1 and the tuned ones."""
        return 1 + len(self.evaluate.tuned)


def read(cfg: PlanConfig) -> Shapes:
    """The stages' configs, as their commands would read them.

    Raises:
        UserError: a config is missing or wrong, or the LLM's shape is not to be had.
    """
    precompute = _load(PrecomputeConfig, cfg.precompute, "precompute")
    pretrain = _load(PretrainConfig, cfg.pretrain, "pretrain")
    tune = _load(TuneConfig, cfg.tune, "tune")
    evaluate = _load(EvaluateConfig, cfg.evaluate, "evaluate")
    llm, folder = _llm(cfg, evaluate.llm.path, evaluate.llm.revision)
    return Shapes(precompute, pretrain, tune, evaluate, Mapper(pretrain.mapper, llm.width), llm, folder)


def _load(schema: type[C], stage: Stage, name: str) -> C:
    try:
        return config.load(schema, [stage.file, *stage.words], f"sm_train.{name}")
    except UserError as error:
        raise UserError(f"stage {name}: {error}") from None


def _llm(cfg: PlanConfig, path: str, revision: str | None) -> tuple[Llama, Path | None]:
    folder = Path(path) if Path(path).is_dir() else None
    if not cfg.llm:
        try:
            return read_shape(path, revision)[0], folder
        except UserError as error:
            raise UserError(f"{error}; give it, as llm={{{', '.join(_LLAMA)}}}") from None
    if missing := [name for name in _LLAMA if name not in cfg.llm]:
        raise UserError(f"llm lacks {', '.join(missing)}; give the shape of {path} whole")
    for name in _LLAMA:
        if cfg.llm[name] < 1:
            raise UserError(f"llm.{name} is {cfg.llm[name]}; it must be above zero")
    return Llama(**{name: cfg.llm[name] for name in _LLAMA}), folder
