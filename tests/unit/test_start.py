"""How a run begins: what it must go on with unchanged, and when nothing is left to do."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sm_train import files, tune
from sm_train.data.batches import SpeechItems
from sm_train.data.loader import plan_items
from sm_train.data.plan import Position
from sm_train.data.target_set import TargetSet
from sm_train.errors import UserError
from sm_train.models.llm import TargetsLlm
from sm_train.models.mapper import SpeechMapper
from sm_train.train import checkpoint, start
from sm_train.train.engines import EngineConfig, make_engine
from sm_train.train.engines.base import fresh_state
from tests import training, tuning


@pytest.fixture(scope="module")
def shard_folder(shard_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(shard_set, tmp_path_factory.mktemp("start") / "set"))


@pytest.fixture(scope="module")
def world(shard_folder: Path) -> Path:
    return tuning.world(shard_folder.parent, shard_folder)


def saved(step: int, contract: dict[str, Any], world: Path) -> checkpoint.Checkpoint:
    mapper = SpeechMapper.from_pretrained(checkpoint.find(world / "stage1"))
    return checkpoint.Checkpoint(fresh_state(mapper), step, Position(1, 2), contract, 0.25)


def test_settings_are_the_values_of_sections_by_dotted_name(world: Path, shard_folder: Path, tmp_path: Path) -> None:
    cfg = training.load(tuning.write_config(tmp_path / "run.yaml", world, shard_folder), stage=tune)
    found = start.settings(cfg, "batch", "objective")
    assert found["batch.tokens"] == 300
    assert found["objective.sigma"] == 0.9
    assert {name.partition(".")[0] for name in found} == {"batch", "objective"}


def test_of_an_engine_only_what_changes_what_is_learnt_is_kept() -> None:
    kept = start.optimizer(EngineConfig())
    assert kept == {"engine.beta1": 0.9, "engine.beta2": 0.98, "engine.eps": 1e-8, "engine.weight_decay": 0.01,
                    "engine.clip": 1.0}  # fmt: skip
    assert start.optimizer(EngineConfig(name="deepspeed", zero_stage=3, precision="bf16", threads=2)) == kept


def test_frozen_is_the_encoder_the_llm_and_the_data(shard_folder: Path) -> None:
    dataset, targets = files.read_json(shard_folder / "dataset.json"), TargetSet(shard_folder, tuning.TARGET)
    found = start.frozen(dataset, targets)
    assert set(found) == {*start.FROZEN_ENCODER, *start.FROZEN_LLM, "normaliser", "targets", "shards"}
    assert found["shards"] == dataset["part_hashes"]
    assert found["tokenizer_hash"] == targets.contract["tokenizer_hash"]
    assert None not in [found[name] for name in found if not name.endswith("revision")]


def test_a_run_is_complete_at_its_last_step(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contract = {"seed": 1, "tasks": {"asr": 1.0}}
    assert not start.is_complete(tmp_path, None, contract, 8)
    assert not start.is_complete(tmp_path, saved(7, contract, world), contract, 8)
    assert capsys.readouterr().out == ""
    assert start.is_complete(tmp_path, saved(8, contract, world), contract, 8)
    assert f"{tmp_path}: complete, 8 steps" in capsys.readouterr().out


@pytest.mark.parametrize("step", [3, 8])
def test_another_contract_is_refused_with_both_values(world: Path, tmp_path: Path, step: int) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}: seed is 1 there, but 2 is asked for; give another run folder"):
        start.is_complete(tmp_path, saved(step, {"seed": 1}, world), {"seed": 2}, 8)


def test_a_run_begins_with_its_config_and_goes_on_where_it_was(
    world: Path, shard_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tuning.write_config(tmp_path / "run.yaml", world, shard_folder)
    cfg, engine = training.load(path, "placement=replicated", stage=tune), make_engine(EngineConfig(device="cpu"), 2)
    mapper = SpeechMapper.from_pretrained(checkpoint.find(world / "stage1"))
    state = start.begin(cfg, engine, {"seed": 0}, mapper.description(), None, "some weights")
    assert (state.attempt, state.global_step, state.position, state.best_valid) == (1, 0, Position(0, 0), None)
    assert (state.contract, state.description, state.seed) == ({"seed": 0}, mapper.description(), 0)
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {"config.yaml", "environment.json", "attempts"}
    assert training.load(tmp_path / "run/config.yaml", stage=tune) == cfg
    assert "some weights, 1 rank on cpu, from step 0 of 8" in capsys.readouterr().out
    with pytest.raises(UserError, match="saved step-0 while this one was starting from step 5; run the same command"):
        start.begin(cfg, engine, {"seed": 0}, mapper.description(), saved(5, {"seed": 0}, world), "some weights")
    newest = tmp_path / "run/checkpoints/step-5"
    newest.mkdir(parents=True)
    (newest / "state.json").touch()
    again = start.begin(cfg, engine, {"seed": 0}, mapper.description(), saved(5, {"seed": 0}, world), "some weights")
    assert (again.attempt, again.global_step, again.position, again.best_valid) == (3, 5, Position(1, 2), 0.25)


def test_the_newest_checkpoint_is_read(world: Path, tmp_path: Path) -> None:
    assert start.read(tmp_path, "pretrain") is None
    found = start.read(world / "stage1", "pretrain")
    assert found is not None
    assert found.global_step == 1
    with pytest.raises(UserError, match="stage1 is not a run of tune; give another run folder"):
        start.read(world / "stage1", "tune")


# ---- the contract of stage 2


def contract_of(world: Path, shard_folder: Path, folder: Path, prompts: Any = None, **overrides: Any) -> dict[str, Any]:
    """What a run of stage 2 must go on with, and under ``fed`` what its first epochs feed."""
    path = tuning.write_config(folder / "run.yaml", world, shard_folder)
    if prompts is not None:
        (folder / "prompts.yaml").write_text(json.dumps(prompts))
        overrides["prompts"] = str(folder / "prompts.yaml")
    cfg = dataclasses.replace(training.load(path, stage=tune), **overrides)
    targets = TargetSet(shard_folder, tuning.TARGET)
    chat = TargetsLlm(targets, cfg.llm, cfg.llm_revision).chat()
    items = tune._items(cfg, SpeechItems(shard_folder, targets, cfg.splits), chat)
    planner = plan_items(items, cfg.seed, cfg.batch.budget, cfg.batch.lanes)
    fed = [[(i, items.message(i, epoch)) for i in items.of_epoch(epoch).tolist()] for epoch in range(2)]
    contract = json.loads(json.dumps(tune._contract(cfg, planner, items, chat)))
    return {"contract": contract, "fed": [sorted(epoch) for epoch in fed]}


@pytest.fixture(scope="module")
def own(world: Path, shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return contract_of(world, shard_folder, tmp_path_factory.mktemp("own"))


def test_a_contract_of_stage_2_names_what_its_plan_and_prompts_follow_from(
    own: dict[str, Any], world: Path, shard_folder: Path, tmp_path: Path
) -> None:
    assert contract_of(world, shard_folder, tmp_path) == own
    contract = own["contract"]
    assert contract["stage"] == "tune"
    assert contract["tasks"] == {"asr": 1.0, "sqa": 0.5}
    assert {"tasks_hash", "seed", "splits", "utterance_plan", "batch.tokens", "engine.clip", "shards"} <= set(contract)
    asked = [p for task in ("asr", "sqa") for p in tuning.PROMPTS[task]["train"]]
    assert {n.removeprefix("rendered.") for n in contract if n.startswith("rendered.")} == set(asked)
    for name, value in (("placement", "offload"), ("checkpoint_activations", True)):
        assert contract_of(world, shard_folder, tmp_path, **{name: value})["contract"] == contract


@pytest.mark.parametrize(
    "changed",
    [
        {"tasks": {"sqa": 0.5, "asr": 1.0}},
        {"tasks": {"asr": 1.0, "sqa": 0.4}},
        {"seed": 1},
        {"prompts": {**tuning.PROMPTS, "asr": {"train": tuning.PROMPTS["asr"]["train"][::-1]}}},
        {"prompts": {**tuning.PROMPTS, "asr": {"train": tuning.PROMPTS["asr"]["train"] * 2 + ["Repeat.\n{speech}"]}}},
        {"prompts": {**tuning.PROMPTS, "asr": {"train": [*tuning.PROMPTS["asr"]["train"], "Again.\n{speech}"]}}},
    ],
    ids=["tasks turned round", "another share", "another seed", "prompts turned round", "a prompt twice", "one more"],
)
def test_what_feeds_other_items_or_wordings_is_another_contract(
    own: dict[str, Any], world: Path, shard_folder: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    """Otherwise a run goes on with another plan, and nothing says so."""
    other = contract_of(world, shard_folder, tmp_path, **changed)
    assert other["fed"] == own["fed"] or other["contract"] != own["contract"]


def test_the_settings_of_a_placement_are_the_engine_s(world: Path, shard_folder: Path, tmp_path: Path) -> None:
    path = tuning.write_config(tmp_path / "run.yaml", world, shard_folder)
    engines = {p: training.load(path, f"placement={p}", stage=tune).placed for p in tune.PLACEMENTS}
    assert {p: (e.name, e.zero_stage, e.offload) for p, e in engines.items()} == {
        "zero3": ("deepspeed", 3, False), "replicated": ("local", 1, False), "offload": ("deepspeed", 3, True),
    }  # fmt: skip
