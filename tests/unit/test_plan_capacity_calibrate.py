"""Calibration's arithmetic and mistakes; its runs are real and are shown in docs/capacity.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sm_train import config
from sm_train.errors import UserError
from tests.builders import ROOT
from tools.plan_capacity import calibrate, check, readings

MINIATURE = str(ROOT / "configs/plan/miniature.yaml")


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_a_fit_finds_base_and_slope_and_neither_is_negative() -> None:
    x = np.array([1.0, 2.0, 4.0])
    assert readings.fit(x, 3 + 2 * x) == pytest.approx((3, 2))
    assert readings.fit(x, 2 * x - 1) == pytest.approx((0, (2 * x - 1).sum() / x.sum()))
    assert readings.fit(x, 5 - x) == pytest.approx(((5 - x).mean(), 0))
    assert readings.fit(np.array([3.0, 3.0]), np.array([6.0, 12.0])) == pytest.approx((0, 3))


def test_a_line_through_the_first_run_meets_its_mean_where_costs_are_bent() -> None:
    sizes = [np.full(4, size) for size in (2800.0, 1400.0, 700.0)]
    runs = [(x, 0.05 + 5e-5 * x + 2e-8 * x**2) for x in sizes]
    base, slope = readings.through(runs)
    assert base + slope * 2800 == pytest.approx(runs[0][1].mean())
    assert base >= 0
    assert slope > 5e-5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "out is not set"),
        (["out=r.json", "steps=3"], "steps is 3; it must be at least 12"),
        (["out=r.json", "rates=r.json"], "leave rates out"),
        (["out=r.json", "corpus.manifest=null"], "hours is 0"),
        (["out=r.json", "corpus.manifest=null", "hours=1"], "a real job needs audio and tasks"),
        (["out=r.json", "corpus.manifest=no.parquet"], "no.parquet"),
    ],
)
def test_a_mistake_of_calibrate_is_one_line(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        calibrate.main([MINIATURE, *words])
    assert said in str(error.value)


def test_a_check_runs_all_stages() -> None:
    with pytest.raises(UserError, match="a check runs them all"):
        check.main([MINIATURE, "stages=[tune]"])


def test_a_comparison_has_ratios_and_a_sum() -> None:
    found = [check.Compared("tune", 2.0, 3.0, 1000.0, 1010.0), check.Compared("evaluate", 2.0, 2.0, 10.0, 10.0)]
    lines = check.table(found).splitlines()
    assert lines[2] == "| tune | 2.0 s | 3.0 s | 1.50 | 1 kB | 1.01 kB | 1.010 |"
    assert lines[-1] == "| all | 4.0 s | 5.0 s | 1.25 | 1.01 kB | 1.02 kB | 1.010 |"


def test_a_job_is_started_by_the_commands_that_a_person_types(tmp_path: Path) -> None:
    from tests.builders import corpus
    from tools.plan_capacity import jobs
    from tools.plan_capacity.settings import PlanConfig

    manifest = corpus(tmp_path / "corpus", 12)
    lines = [f'{{"utterance_id": "utt-{i:03d}", "task": "asr", "answer": "a"}}\n' for i in range(12)]
    (tmp_path / "instructions.jsonl").write_text("".join(lines))
    words = [f"corpus.manifest={manifest}", f"corpus.instructions={tmp_path / 'instructions.jsonl'}", "gpus=2",
             "pretrain.words=['valid_splits=[dev]']", "evaluate.words=['splits=[dev]']"]  # fmt: skip
    cfg = config.load(PlanConfig, [MINIATURE, *words], "test")
    place = jobs.carve(cfg, tmp_path / "job", jobs.Sizes(6, 2, 2))
    assert len((tmp_path / "job/manifest.jsonl").read_text().splitlines()) == 8
    assert len((tmp_path / "job/instructions.jsonl").read_text().splitlines()) == 8
    encode, train = jobs.command(place, "precompute"), jobs.command(place, "pretrain")
    assert encode[1:4] == ["-m", "cluster.precompute", "configs/precompute/miniature.yaml"]
    assert "actors=2" in encode
    assert train[1:7] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    assert jobs.command(place, "retarget")[2:4] == ["cluster.retarget", str(tmp_path / "job/shards")]
    assert jobs.command(place, "evaluate")[2] == "sm_train.evaluate"
