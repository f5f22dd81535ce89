"""A plan's bytes against those of real stages on a small corpus: they are deterministic, so within 5% always."""

from __future__ import annotations

from pathlib import Path

import pytest

from sm_train import config, precompute, pretrain
from sm_train.models import targets, tasks
from tests.builders import ROOT
from tools.miniature.corpus import main as make_corpus
from tools.plan_capacity import jobs, plan
from tools.plan_capacity.check import CheckConfig, left_by, place_of

pytestmark = pytest.mark.slow


def test_bytes_are_within_5_percent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    corpus = tmp_path / "corpus"
    counts = ["train=300", "valid=20", "test=20", "test_voices=20"]
    make_corpus(["configs/miniature/easy.yaml", f"out={corpus}", *counts])
    words = [f"corpus.manifest={corpus}/manifest.parquet", f"corpus.instructions={corpus}/instructions.parquet",
             "utterances=300", "held_out=20", "steps=4"]  # fmt: skip
    place = place_of(config.load(CheckConfig, ["configs/plan/miniature.yaml", *words], "test"), tmp_path / "job")
    (planned,) = plan.make(place.cfg)
    measured = {}
    done = config.load(precompute.PrecomputeConfig, [*jobs.command(place, "precompute")[3:]], "test")
    precompute.run(done, precompute.in_this_process)
    measured["precompute"] = left_by(place, "precompute")
    (target,) = place.shapes.precompute.targets
    targets.build(target, place.shards)
    tasks.build(place.shards, target.name, [Path(str(place.cfg.corpus.instructions))])
    measured["retarget"] = left_by(place, "retarget")
    engine = pretrain.run(place.shapes.pretrain)
    assert engine is not None
    engine.close()
    measured["pretrain"] = left_by(place, "pretrain")
    predicted = {stage.name: stage.disk_bytes for stage in planned.stages if stage.name in measured}
    assert measured == pytest.approx(predicted, rel=0.05)
    kinds = next(stage.disk for stage in planned.stages if stage.name == "precompute")
    shards = sum(path.stat().st_size for path in place.shards.glob("part-*/*.mds"))
    assert shards == pytest.approx(kinds["features"], rel=0.01)
