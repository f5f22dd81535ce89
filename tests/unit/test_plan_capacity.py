"""The planner: formulas against worked numbers, plans that grow as they must, mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sm_train import config
from sm_train.errors import UserError
from sm_train.models.mapper import MapperConfig
from tests.builders import ROOT
from tools.plan_capacity import formulas, hardware, plan, render, storage
from tools.plan_capacity.__main__ import main
from tools.plan_capacity.hardware import Mapper
from tools.plan_capacity.plan import Plan
from tools.plan_capacity.settings import PlanConfig

LIBRISPEECH = str(ROOT / "configs/plan/librispeech.yaml")
HOURS = 960.9
PEAKS = {"V100-32": 125e12, "A100-80": 312e12, "H100-80": 989e12}


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # configs name each other by paths that start there


def planned(*words: str) -> Plan:
    (found,) = plan.make(config.load(PlanConfig, [LIBRISPEECH, *words], "test"))
    return found


def test_the_encoders_work_and_speed_are_the_worked_ones() -> None:
    flop = formulas.encoder_flop_per_s(635e6, 24, 1024, 12.3)
    assert flop == pytest.approx(68e9, rel=0.01)
    assert 3600 * flop == pytest.approx(0.245e15, rel=0.002)
    assert 3600 * formulas.encoder_flop_per_s(635e6, 0, 1024, 12.3) == pytest.approx(0.229e15, rel=0.002)
    rtfx = {name: formulas.times_real_time(peak, flop) for name, peak in PEAKS.items()}
    assert rtfx == pytest.approx({"V100-32": 1840, "A100-80": 4590, "H100-80": 14500}, rel=0.005)
    assert formulas.times_real_time(0.24 * 312e12, flop) == pytest.approx(1100, rel=0.01)  # Parakeet's share of peak
    assert HOURS * 60 / formulas.times_real_time(0.24 * 312e12, flop) == pytest.approx(52, rel=0.01)
    assert formulas.times_real_time(160e12, flop) == pytest.approx(2350, rel=0.005)


def test_features_are_177_gb() -> None:
    assert formulas.feature_bytes_per_s(25, 1024) == 51_200
    assert HOURS * 3600 * formulas.feature_bytes_per_s(25, 1024) == pytest.approx(177e9, rel=0.001)


def test_the_mappers_work_by_the_exact_split_and_by_equal_blocks() -> None:
    mapper = Mapper(MapperConfig(), 4096)
    first = mapper.multiplications - mapper.parameters
    assert (first, mapper.parameters - first) == pytest.approx((58.8e6, 218.2e6), rel=0.001)
    exact = formulas.mapper_flop_per_s(first, mapper.parameters - first, 25)
    assert exact == pytest.approx(12.6e9, rel=0.002)
    equal = formulas.mapper_flop_per_s(138.5e6, 138.5e6, 25)
    assert equal == pytest.approx(15.6e9, rel=0.002)
    assert 960 * 3600 * equal == pytest.approx(53.9e15, rel=0.002)


def test_floors_of_a_step() -> None:
    floors = [1e3 * formulas.adam_s(277e6, hardware.MEMORY_GB_S[name] * 1e9) for name in PEAKS]
    assert floors == pytest.approx([9.2, 4.1, 2.5], rel=0.02)
    assert 1e3 * formulas.all_reduce_s(554e6, 4, 130e9) == pytest.approx(6.4, rel=0.01)
    assert 1e3 * formulas.all_reduce_s(554e6, 4, 10e9) == pytest.approx(83, rel=0.01)
    assert formulas.all_reduce_s(554e6, 1, 10e9) == 0


@pytest.mark.parametrize(
    ("steps", "save_every", "validate_every", "saves"),
    [
        (1000, 200, 200, 5),
        (1000, 200, 0, 5),
        (1000, 300, 0, 4),
        (1000, 300, 200, 7),
        (100, 1000, 30, 4),
        (60, 6, 4, 20),
    ],
)
def test_saves_are_counted_as_the_loop_makes_them(steps: int, save_every: int, validate_every: int, saves: int) -> None:
    asked = {n for n in range(1, steps + 1) if n % save_every == 0 or n == steps}
    best = {n for n in range(1, steps + 1) if validate_every and n % validate_every == 0}
    assert storage.num_saves(steps, save_every, validate_every) == saves == len(asked | best)


def test_fp32_is_planned_at_its_own_peak() -> None:
    half, whole = (
        planned("stages=[pretrain]", f"pretrain.words=[engine.precision={precision}]") for precision in ("bf16", "fp32")
    )
    slower = whole.stages[0].parts["compute"] / half.stages[0].parts["compute"]
    assert slower == pytest.approx(312 / 19.5)


def test_storing_pays_behind_the_first_epoch() -> None:
    assert formulas.break_even_epochs(10, 0, 100) == 1
    assert formulas.break_even_epochs(10, 2, 5) == 1.25


def test_a_plan_of_librispeech_is_near_the_worked_numbers() -> None:
    found = planned("gpus=4", "gpu=A100-80")
    stages = {stage.name: stage for stage in found.stages}
    precompute, pretrain, tune = stages["precompute"], stages["pretrain"], stages["tune"]
    held_out = (10.7 + 10.5) / HOURS
    assert precompute.disk["features"] == pytest.approx((1 + held_out) * 177e9, rel=0.002)
    assert precompute.parts["encoding"] * 4 / 60 == pytest.approx((1 + held_out) * 52, rel=0.03)
    assert stages["retarget"].disk["token ids"] == pytest.approx(4 * 12.5e6 * 2 * (1 + held_out), rel=0.4)  # two LLMs
    assert pretrain.disk["checkpoints"] == pytest.approx(3 * 3.32e9, rel=0.01)
    assert found.stored is not None
    flop = pretrain.parts["compute"] * 4 * 156e12
    assert flop / found.stored.epochs / (HOURS * 3600) == pytest.approx(12.6e9, rel=0.03)  # padding included
    assert tune.parts["compute"] / 1000 == pytest.approx(0.46e15 / 4 / 156e12, rel=0.5)  # rows of one length there


def test_twice_the_hours_are_twice_the_bytes_and_the_work_of_an_epoch() -> None:
    words = ("gpus=4", "gpu=H100-80", "epochs=3", "corpus.valid_hours=0", "corpus.test_hours=0.001")
    one, two = (planned(f"hours={hours}", *words) for hours in (5000, 10000))
    before, after = ({stage.name: stage for stage in found.stages} for found in (one, two))
    for name in ("precompute", "pretrain"):
        assert after[name].read == pytest.approx(2 * before[name].read, rel=1e-3)
    assert after["precompute"].disk_bytes == pytest.approx(2 * before["precompute"].disk_bytes, rel=1e-3)
    assert after["retarget"].disk["token ids"] == pytest.approx(2 * before["retarget"].disk["token ids"], rel=1e-3)
    assert after["pretrain"].parts["compute"] == pytest.approx(2 * before["pretrain"].parts["compute"], rel=1e-3)
    assert after["tune"].seconds == pytest.approx(before["tune"].seconds)


@pytest.mark.parametrize("stage", ["precompute", "pretrain", "tune"])
def test_more_gpus_take_no_longer(stage: str) -> None:
    words = ("gpu=A100-80", "pretrain.words=[batch.lanes=64]", "tune.words=[batch.lanes=64]", "store_gb_s=1000")
    found = [planned(f"gpus={gpus}", *words) for gpus in (1, 2, 4, 8)]
    seconds = [next(s.seconds for s in one.stages if s.name == stage) for one in found]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > 3 * seconds[-1]


def test_the_limit_moves_from_the_gpus_to_what_feeds_them() -> None:
    words = ("gpus=64", "gpu=H100-80", "epochs=2", "pretrain.words=[batch.lanes=64]", "tune.words=[batch.lanes=64]")
    rich, poor = (
        planned(*words, "store_gb_s=200", "network_gb_s=400"),
        planned(*words, "store_gb_s=1", "network_gb_s=400"),
    )
    limits = [{stage.name: stage.limit for stage in found.stages} for found in (rich, poor)]
    assert limits[0]["pretrain"] == "compute"
    assert limits[1]["pretrain"] == "storage"
    assert limits[1]["precompute"].startswith("storage")
    near = planned(*words, "store_gb_s=1", "network_gb_s=400", "cache_tb=1", "epochs=20")
    assert {stage.name: stage for stage in near.stages}["pretrain"].read == pytest.approx(8 * 177e9 * 1.022, rel=0.01)
    slow_links = planned("gpus=8", "gpu=V100-32", "gpus_per_node=1", "network_gb_s=1", "stages=[pretrain]",
                         "pretrain.words=[batch.lanes=8]")  # fmt: skip
    assert slow_links.stages[0].limit == "all-reduce"


def test_a_million_hours_are_warned_of() -> None:
    words = ("gpus=64", "epochs=1", "pretrain.words=[batch.lanes=64]", "tune.words=[batch.lanes=64]")
    notes = [note for stage in planned("hours=1000000", *words).stages for note in stage.notes]
    assert any("not measured above" in note for note in notes)
    assert not any("not measured above" in note for note in planned(*words).stages[2].notes)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hours=0"], "hours is 0"),
        (["hours=-3"], "hours is -3"),
        (["hours=many"], "hours is many"),
        (["gpu=B300"], "gpu is 'B300'; those known are V100-32, A100-40, A100-80, H100-80, cpu"),
        (["gpus=8"], "8 GPUs do not divide batch.lanes, 4; give pretrain.gpus one of 1, 2, 4"),
        (
            ["gpus=4", "gpu=V100-32", "tune.words=[batch.samples=64,engine.precision=fp16]"],
            "tune: LLM meta-llama/Llama-3.1-8B-Instruct",
        ),
        (["gpus=4", "gpu=V100-32", "llm.layers=80", "stages=[evaluate]"], "do not fit V100-32"),
        (["tune.file=configs/tune/none.yaml"], "config file configs/tune/none.yaml does not exist"),
        (["stages=[encode]"], "stages names 'encode'"),
        (["llm={layers: 2}"], "llm lacks width"),
        (["corpus.lengths=[[1, gamma, 2, 3]]"], "corpus.lengths holds [1, 'gamma', 2, 3]"),
        (["corpus.lengths=[[1, normal, 10, -1]]"], "corpus.lengths holds [1, 'normal', 10, -1]"),
        (["corpus.lengths=[[1, uniform, 5, least]]"], "corpus.lengths holds [1, 'uniform', 5, 'least']"),
        (["corpus.test_hours=-5"], "corpus.test_hours is -5"),
        (["hours=[]"], "hours is []"),
        (["llm.heads=0"], "llm.heads is 0"),
        (["gpu=V100-32", "pretrain.words=[engine.precision=bf16]"], "take pretrain.words=[engine.precision=fp16]"),
        (["rates=none.json"], "file none.json does not exist"),
        (["gpus=4", "pretrain.gpus=8"], "pretrain.gpus is 8, but gpus is 4"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        planned(*words)
    assert said in str(error.value)


def test_a_missing_plan_is_one_line() -> None:
    with pytest.raises(UserError, match=r"config file no\.yaml does not exist"):
        main(["no.yaml", "hours=1"])


def test_rates_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_text(
        json.dumps({"schema": 1, "facts": {"gpu": "A100-80", "gpus": 1, "encoder": ["w", 1, "x"]}, "rates": {}})
    )
    with pytest.raises(UserError, match=r"encoder was .* calibrate again"):
        planned(f"rates={path}")
    path.write_text("{}")
    with pytest.raises(UserError, match="holds no rates"):
        planned(f"rates={path}")


def test_a_plan_as_text_is_the_golden_one(capsys: pytest.CaptureFixture[str]) -> None:
    main([LIBRISPEECH, "hours=960.9", "gpus=4", "gpu=A100-80", "price_per_gpu_hour=2"])
    golden = Path(__file__).with_name("plan_capacity.golden")
    assert capsys.readouterr().out == golden.read_text()


def test_a_plan_as_json_holds_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [LIBRISPEECH, "hours=[960.9,10000]", "gpus=4", "json=true", f"out={tmp_path / 'plan.json'}"]
    main(words)
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads((tmp_path / "plan.json").read_text())
    first, second = shown["plans"]
    assert first["hours"] == pytest.approx(960.9)
    assert second["stages"][0]["disk_bytes"] > 9 * first["stages"][0]["disk_bytes"]
    assert sum(stage["seconds"] for stage in first["stages"]) == pytest.approx(first["seconds"])
    main(words[:3])
    assert capsys.readouterr().out.count("\n") == 4  # heads, rule, two sizes


def test_sizes_and_durations_are_told_in_three_digits() -> None:
    assert [render.size(n) for n in (12, 1_234, 177.1e9, 3.3e15)] == ["12 B", "1.23 kB", "177 GB", "3.3 PB"]
    assert [render.duration(s) for s in (1.26, 150, 9000, 200_000)] == ["1.3 s", "2.5 min", "2.5 h", "2.3 d"]
