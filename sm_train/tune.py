"""Stage 2: tune a pretrained mapper against the frozen LLM it was pretrained for.

    python -m sm_train.tune CONFIG.yaml [key=value ...]
    torchrun --nproc-per-node 2 -m sm_train.tune CONFIG.yaml [key=value ...]

The LLM's weights never change and are in no checkpoint. The same command continues an interrupted run exactly, on any
number of ranks that divides batch.lanes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sm_train import config
from sm_train.chat import Chat
from sm_train.data.batches import SpeechItems
from sm_train.data.instructions import SPLICES, InstructionItems, Mixture
from sm_train.data.loader import Loader, LoaderConfig, plan_items
from sm_train.data.mirror import locate
from sm_train.data.plan import WINDOW_ITEMS, Planner
from sm_train.data.target_set import TargetSet
from sm_train.data.text import normalise
from sm_train.errors import exit_hard, run_command
from sm_train.models.adapter import AdapterConfig
from sm_train.models.llm import TargetsLlm, load_model
from sm_train.models.mapper import MapperConfig
from sm_train.prompts import read_prompts
from sm_train.runlog import say
from sm_train.train import origin, start
from sm_train.train.engines import Engine, EngineConfig
from sm_train.train.engines.base import place
from sm_train.train.loop import LoopConfig
from sm_train.train.objectives.instruct import InstructConfig, InstructObjective
from sm_train.train.objectives.padded import PaddedRegression
from sm_train.train.schedule import ScheduleConfig
from sm_train.train.validate import InstructionLosses, NearestTokenWer

PLACEMENTS = ("zero3", "replicated", "offload")
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_PROVEN = 16  # transcripts that every wording is proven with
_FRAMES = 10_000  # padded frames of a micro-batch of validation


@dataclass(frozen=True)
class TuneBatchConfig:
    """The size of a step."""

    tokens: int = config.key(4096, "budget of a micro-batch: items times the longest one's tokens in the LLM")
    samples: int = config.key(0, "if above 0, a micro-batch holds up to this many items instead, whatever their length")
    lanes: int = config.key(8, "G: micro-batches of a step over all ranks; the number of ranks must divide it")
    window: int = config.key(WINDOW_ITEMS, "items that are sorted by length together")

    def __post_init__(self) -> None:
        for name in ("tokens", "lanes", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"batch.{name} is {getattr(self, name)}; it must be at least 1")
        if self.samples < 0:
            raise ValueError(f"batch.samples is {self.samples}; it must be 0 or more")

    @property
    def unit(self) -> str:
        """What the budget counts."""
        return "samples" if self.samples else "tokens"

    @property
    def budget(self) -> int:
        """Of a micro-batch, in :attr:`unit`."""
        return self.samples or self.tokens


@dataclass(frozen=True)
class TuneConfig:
    """Stage 2."""

    run: str = config.key(config.REQUIRED, "run folder")
    mapper: str = config.key(
        config.REQUIRED, "where the mapper comes from: a run folder of pretrain, a checkpoint, or scratch (of shape)"
    )
    shape: MapperConfig = config.key(MapperConfig(), "the shape of a mapper from scratch; otherwise it has its own")
    lora: AdapterConfig = config.key(AdapterConfig(), "an adapter of the LLM that is trained with the mapper")
    shards: str = config.key(config.REQUIRED, "shard set that precompute wrote")
    target: str = config.key(config.REQUIRED, "name of the LLM's target set in it, with tasks (cluster.retarget)")
    llm: str | None = config.key(None, "folder or hub repository; null takes the LLM that the targets came from")
    llm_revision: str | None = config.key(None, "hub revision of llm")
    llm_stage_to: str | None = config.key(None, "folder on each node's own disk: the LLM is copied there first")
    placement: str = config.key(
        "zero3", "the LLM's weights: zero3 (partitioned over the ranks) | replicated (engine decides the mapper's) | "
        "offload (partitioned, waiting in host memory)"
    )  # fmt: skip
    checkpoint_activations: bool = config.key(False, "keep only each layer's input of the LLM, and compute it again")
    tasks: dict[str, float] = config.key(
        config.REQUIRED, "asr, st, st-LANGUAGE, sqa: share of the items, as {asr: 1}; 0 leaves one out"
    )
    prompts: str = config.key(config.REQUIRED, "YAML file of prompts by task; the train paraphrases are used")
    splice: str = config.key("all", "what stands in the prompt: all positions | text, the first L, as many as tokens")
    max_answer_tokens: int = config.key(150, "a longer answer, end of turn included, is an error")
    splits: list[str] = config.key(["train"], "splits to train on")
    valid_splits: list[str] = config.key(["valid"], "splits to validate on; [] for none")
    seed: int = config.key(0, "seed of plan, prompts and dropout")
    objective: InstructConfig = config.key(InstructConfig(), "the loss")
    batch: TuneBatchConfig = config.key(TuneBatchConfig(), "the size of a step")
    schedule: ScheduleConfig = config.key(ScheduleConfig(shape="constant"), "the learning rate")
    engine: EngineConfig = config.key(EngineConfig(), "precision, optimizer, distribution")
    loop: LoopConfig = config.key(LoopConfig(steps=1000), "steps, checkpoints, validation")
    loader: LoaderConfig = config.key(LoaderConfig(), "reading ahead, remote shard sets")

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must lie in [0, 2^63)")
        if self.placement not in PLACEMENTS:
            raise ValueError(f"placement is {self.placement!r}; it must be one of {', '.join(PLACEMENTS)}")
        if not self.shares or not all(0 <= share < math.inf for share in self.tasks.values()):
            raise ValueError(f"tasks is {dict(self.tasks)}; it must name tasks with shares above 0, as {{asr: 1}}")
        if self.splice not in SPLICES:
            raise ValueError(f"splice is {self.splice!r}; it must be one of {', '.join(SPLICES)}")
        if self.lora.rank and self.placement != "replicated":
            raise ValueError(f"lora.rank is {self.lora.rank} with placement {self.placement}; it needs replicated")
        if self.placement == "replicated" and self.engine.zero_stage == 3:
            raise ValueError("engine.zero_stage is 3, which partitions the LLM too; take it for placement zero3 alone")
        if self.llm_revision and not self.llm:
            raise ValueError(f"llm_revision is {self.llm_revision!r} without an llm; name the repository too")

    @property
    def shares(self) -> dict[str, float]:
        """The tasks that take part."""
        return {name: float(share) for name, share in self.tasks.items() if share > 0}

    @property
    def placed(self) -> EngineConfig:
        """The engine that the placement asks for."""
        if self.placement == "replicated":
            return self.engine
        return replace(self.engine, name="deepspeed", zero_stage=3, offload=self.placement == "offload")


def run(cfg: TuneConfig) -> Engine | None:
    """Train to the last step; a finished run returns at once."""
    folder = Path(cfg.run)
    resumed = start.read(folder, start.TUNE)
    root, mirror = locate(cfg.shards, cfg.target, cfg.loader.cache, cfg.loader.cache_limit_gb)
    targets = TargetSet(root, cfg.target)
    llm = TargetsLlm(targets, cfg.llm, cfg.llm_revision)
    if cfg.checkpoint_activations:
        llm.require_no_dropout()
    chat = llm.chat()
    items = _items(cfg, SpeechItems(root, targets, cfg.splits, mirror), chat)
    llm.require_ids(items.largest_id)
    llm.require_room(items.longest_row)
    if cfg.mapper == origin.SCRATCH:
        mapper, began_with = origin.scratch(cfg.shape, cfg.seed, items.speech, resumed, folder)
    else:
        mapper, began_with = origin.pretrained(cfg.mapper, folder, items.speech, resumed)
    regression = PaddedRegression(
        targets.rows_RD, targets.pad_row, targets.contract["mean_square"], cfg.objective.mse, cosine="words"
    )
    objective = InstructObjective(mapper, regression, cfg.objective, cfg.splice)
    batch = cfg.batch
    planner = plan_items(items, cfg.seed, batch.budget, batch.lanes, batch.window)
    loader = Loader(items, objective.counts, planner, *place(), cfg.loader.read_ahead)
    contract = _contract(cfg, planner, items, chat) | llm.facts() | began_with
    if start.is_complete(folder, resumed, contract, cfg.loop.steps):
        return None
    validation = _validation(cfg, items.speech, chat)
    mixture = ", ".join(f"{name} {share:g}" for name, share in cfg.shares.items())
    size = f"{mapper.num_parameters:,} parameters, {len(items)} instructions ({mixture})"
    near = llm.staged(cfg.llm_stage_to)
    engine = start.make_agreed_engine(cfg.placed, batch.lanes, folder, resumed, contract)
    with engine.building():
        objective.llm = load_model(llm.path, llm.revision, _DTYPES[cfg.engine.precision], copy=near)
    if cfg.checkpoint_activations:  # each layer's input is kept, the rest computed again in the backward
        objective.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained, description = origin.trained(mapper, objective.llm, cfg.lora, cfg.seed, llm.path)
    engine.prepare(objective, trained, resumed.state if resumed else None)
    holds = f"{size}, LLM {llm.path} {cfg.placement}, {cfg.placed}"
    with engine.watch:
        state = start.begin(cfg, engine, contract, description, resumed, holds)
        validate = validation and partial(_validate, validation, engine, objective)
        return start.follow_through(cfg, engine, objective, loader, state, validate)


def _items(cfg: TuneConfig, speech: SpeechItems, chat: Chat) -> InstructionItems:
    """Instructions about some utterances; their prompts are proven to leave a transcript's tokens as they are alone."""
    prompts = read_prompts(Path(cfg.prompts))
    mixture = Mixture(cfg.shares, prompts, "train", cfg.batch.unit, cfg.max_answer_tokens, cfg.seed, cfg.splice)
    items = InstructionItems(speech, chat, mixture)
    first_of_kind = {task.task: i for i, task in reversed(list(enumerate(items.tasks)))}
    some = speech.ordinals[:: -(-len(speech) // _PROVEN)]
    texts = speech.utterances.column("text").take(some).to_pylist()
    transcripts = [normalise(text, speech.targets.contract["normaliser"]) for text in texts]
    chat.prove([message for i in first_of_kind.values() for message in items.messages(i)], transcripts)
    return items


def _contract(cfg: TuneConfig, planner: Planner, items: InstructionItems, chat: Chat) -> dict[str, Any]:
    """What a run must go on with unchanged; ranks, placement and precision may change, and the number of steps."""
    chosen = {"stage": start.TUNE, "tasks": cfg.shares, **start.settings(cfg, "batch", "objective", "schedule")}
    chosen |= start.settings(cfg, "lora") if cfg.lora.rank else {}
    chosen |= {"splice": cfg.splice} if cfg.splice != "all" else {}
    frozen = start.frozen(items.speech.dataset, items.speech.targets) | {"tasks_hash": items.digest}
    wordings = {kind: list(items.mixture.prompts.of(kind, "train")) for kind in items.kinds}
    prompts = {f"prompts.{kind}": messages for kind, messages in wordings.items()}
    rendered = {f"rendered.{m}": [list(ids) for ids in chat.halves(m)] for ms in wordings.values() for m in ms}
    plan = {
        "seed": cfg.seed,
        "splits": cfg.splits,
        "valid_splits": cfg.valid_splits,
        "loader.cache": "used" if planner.has_lane_windows else "not used",
        "utterance_plan": planner.fingerprint,
    }
    return {**chosen, **start.optimizer(cfg.engine), **frozen, **prompts, **rendered, **plan}


Validation = tuple[InstructionLosses, NearestTokenWer]


def _validation(cfg: TuneConfig, trained: SpeechItems, chat: Chat) -> Validation | None:
    if not cfg.valid_splits or not cfg.loop.validate_every:
        return None
    items = _items(cfg, trained.of_splits(cfg.valid_splits), chat)
    say(f"validation: {len(items)} instructions, {len(items.speech)} utterances of {', '.join(cfg.valid_splits)}")
    frames = max(int(items.speech.lengths.max()), _FRAMES)
    return InstructionLosses(items, cfg.batch.budget), NearestTokenWer(items.speech, "change_point", frames)


def _validate(validation: Validation, engine: Engine, objective: InstructObjective) -> dict[str, float]:
    losses, wer = validation
    return {**losses(engine, objective), **wer(engine, objective.mapper)}


def main(argv: list[str]) -> None:
    engine = run(config.load(TuneConfig, argv, "sm_train.tune"))
    if engine is not None:
        engine.close()
        exit_hard()


if __name__ == "__main__":
    run_command(main)
