"""A training on Ray: what its command reads and refuses; tests/integration has it on a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster import ray_train
from cluster.ray_train import RanksConfig
from sm_train.errors import UserError
from tests import training
from tests.training import free_port


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    return training.write_config(tmp_path / "run.yaml", tmp_path / "shards", engine={"threads": 3})


def test_words_of_the_places_and_of_the_stage(config_file: Path) -> None:
    asked, cfg, module = ray_train.read(["pretrain", str(config_file), "nodes=2", "ranks_per_node=4", "loop.steps=7"])
    assert (asked.nodes, asked.ranks_per_node, asked.gpus_per_node) == (2, 4, 0)
    assert cfg.loop.steps == 7
    assert module == ["sm_train.pretrain", str(config_file), "loop.steps=7"]
    assert asked.of_node(cfg.engine.threads) == {"CPU": 16.0}
    assert RanksConfig(ranks_per_node=2, gpus_per_node=2, cpus_per_rank=5).of_node(1) == {"CPU": 10.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "stage is ''; it must be one of pretrain, tune"),
        (["evaluate", "x"], "stage is 'evaluate'"),
        (["pretrain", "CONFIG", "nodes=0"], "nodes is 0; it must be at least 1"),
        (["pretrain", "CONFIG", "nodes=two"], "nodes"),
        (["pretrain", "CONFIG", "node=2"], "node"),
        (["tune", "absent.yaml"], "absent.yaml does not exist"),
    ],
)
def test_mistakes_are_named(words: list[str], said: str, config_file: Path) -> None:
    with pytest.raises(UserError, match=said):
        ray_train.read([str(config_file) if word == "CONFIG" else word for word in words])


def test_a_cluster_must_be_named_and_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match="RAY_ADDRESS names no cluster; submit with"):
        ray_train.connect()
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match="where no Ray answers"):
        ray_train.connect()
