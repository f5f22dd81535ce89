"""The graph of a world: what needs what, in which order, with which words; and what a world's file may say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sm_train import config
from sm_train.errors import UserError
from tests.builders import ROOT
from tools.reproduce import world
from tools.reproduce.graph import Item, hashes, items_of
from tools.reproduce.world import WordingsConfig, WorldConfig


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def hard() -> WorldConfig:
    return config.load(WorldConfig, ["configs/reproduce/miniature-hard.yaml"], "test")


def items(found: WorldConfig, rows: list[str] | None = None, seeds: tuple[int, ...] = (0, 1, 2)) -> dict[str, Item]:
    return {item.name: item for item in items_of(found, Path("out"), rows or list(found.rows), seeds)}


def test_what_is_needed_stands_before(hard: WorldConfig) -> None:
    found = items(hard)
    order = list(found)
    for number, item in enumerate(found.values()):
        assert set(item.needs) <= set(order[:number]), item.name


def test_one_seed_of_the_main_rows_is_whole_before_the_next_and_ablations_come_last(hard: WorldConfig) -> None:
    order = list(items(hard))
    of_seed = [max(i for i, name in enumerate(order) if name == f"joint-lora-{seed}-evaluate") for seed in (0, 1, 2)]
    assert of_seed == sorted(of_seed)
    assert order.index("joint-lora-0-evaluate") < order.index("stage1-1")
    assert of_seed[-1] < order.index("alpha1-0")
    assert "alpha1-1" not in order


def test_all_wordings_are_asked_of_the_seeds_named_once_the_main_rows_are_there(hard: WorldConfig) -> None:
    order = list(items(replace(hard, wordings=WordingsConfig([1]))))
    assert order.index("joint-lora-2-evaluate") < order.index("references-wordings") < order.index("alpha1-0")
    assert {name for name in order if name.endswith("-wordings")} == {
        "references-wordings",
        *(f"{key}-1-wordings" for key, row in hard.rows.items() if row.group == "main" and row.kind != "reference"),
    }
    words = items(replace(hard, wordings=WordingsConfig([1])))["stage1-1-wordings"].command
    assert {"paraphrases=all", "prompt_group=held_out", "splits=[test]", "out=out/wordings/stage1/1"} <= set(words)
    assert not [name for name in items(replace(hard, wordings=WordingsConfig())) if name.endswith("-wordings")]


def test_a_row_brings_along_what_it_builds_on_and_no_more(hard: WorldConfig) -> None:
    assert list(items(hard, ["asr-ce"], (1,))) == [
        "corpus", "precompute-ctc", "tasks-ctc", "stage1-1", "asr-ce-1", "asr-ce-1-evaluate",
    ]  # fmt: skip
    assert list(items(hard, ["untrimmed"], (0,)))[-2:] == ["stage1-0", "untrimmed-0-evaluate"]


def test_words_say_where_a_mapper_comes_from(hard: WorldConfig) -> None:
    found = items(hard)
    assert "mapper=out/rows/stage1/2" in found["asr-ce-2"].command
    assert "mapper=scratch" in found["joint-asr-0"].command
    shape = next(word for word in found["joint-asr-0"].command if word.startswith("shape="))
    assert '"widths": [144, 192, 1024]' in shape
    assert {"run=out/rows/stage1/0", "trim=none"} <= set(found["untrimmed-0-evaluate"].command)
    assert "shards=out/shards/ssl" in found["ssl-0"].command
    assert "seed=2" in found["asr-ce-2"].command


def test_every_command_is_one_that_its_stage_takes(hard: WorldConfig) -> None:
    from sm_train.evaluate import EvaluateConfig
    from sm_train.precompute import PrecomputeConfig
    from sm_train.pretrain import PretrainConfig
    from sm_train.tune import TuneConfig

    schemas = {
        "sm_train.precompute": PrecomputeConfig, "sm_train.pretrain": PretrainConfig, "sm_train.tune": TuneConfig,
        "sm_train.evaluate": EvaluateConfig,
    }  # fmt: skip
    heard = {key for key, row in hard.rows.items() if row.evaluate} | {"references"}  # others differ by folders alone
    for item in items(hard, seeds=(0,)).values():
        if item.kind == "evaluate" and not heard & {item.name, item.name.removesuffix("-0-evaluate")}:
            continue
        if schema := schemas.get(item.command[0]):
            config.load(schema, list(item.command[1:]), item.name)


def test_a_hash_follows_from_words_files_and_all_that_is_needed(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("a: 1")

    def made(word: str) -> dict[str, str]:
        first = Item("first", "kind", ("module", word), (), tmp_path / "x", (file,))
        second = Item("second", "kind", ("module",), ("first",), tmp_path / "y", ())
        return hashes([first, second])

    before = made("steps=1")
    assert made("steps=1") == before
    assert all(made("steps=2")[name] != before[name] for name in before)
    file.write_text("a: 1  # a comment")
    assert made("steps=1") == before
    file.write_text("a: 2")
    assert all(made("steps=1")[name] != before[name] for name in before)


STAGE = {"file": "x.yaml"}
ROWS: dict[str, Any] = {"stage1": {"title": "one", "kind": "pretrain"}}


@pytest.mark.parametrize(
    ("rows", "claims", "said"),
    [
        ({"t": {"title": "t", "kind": "tune", "base": "other"}}, [], "rows.t.base is 'other'"),
        ({"t": {"title": "t", "kind": "train"}}, [], "rows.t.kind is 'train'"),
        ({"t": {"title": "t", "kind": "again"}}, [], "again needs a base"),
        ({"t": {"title": "t", "kind": "reference"}}, [], "topline and cascade"),
        ({"t": {"title": "t", "kind": "tune", "base": "stage1", "seeds": [7]}}, [], "seed 7"),
        ({"t": {"title": "t", "kind": "pretrain", "encoder": "ssl"}}, [], "encoder is 'ssl'"),
        ({}, [{"says": "s", "a": "stage1", "b": "none", "columns": ["asr WER"]}], "b names 'none'"),
        ({}, [{"says": "s", "a": "stage1", "b": "stage1", "columns": ["WER"]}], "columns names 'WER'"),
    ],
)
def test_a_mistake_in_a_world_is_named(rows: dict[str, Any], claims: list[Any], said: str) -> None:
    stages = dict.fromkeys(world.STAGES, STAGE)
    with pytest.raises(UserError, match=said):
        config.from_mapping(WorldConfig, {**stages, "rows": {**ROWS, **rows}, "claims": claims}, "test")


def test_a_world_that_is_not_there_is_an_error_that_lists_those_that_are() -> None:
    with pytest.raises(UserError, match="miniature"):
        world.read("nowhere", [])
    with pytest.raises(UserError, match=r"corpus.file is gone.yaml"):
        world.read("miniature", ["corpus.file=gone.yaml"])
