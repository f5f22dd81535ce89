"""The simulation of faults beside the closed formulas."""

from __future__ import annotations

import pytest

from sm_train.errors import UserError
from tools.plan_capacity import formulas
from tools.plan_capacity.goodput import LLAMA_3_FAULTS, GoodputConfig, Simulated, main, simulate


def simulated(mean_s: float, **settings: float) -> tuple[Simulated, float, float]:
    """The simulation, the first-order formula and the exact one, at the best interval."""
    cfg = GoodputConfig(mtbf_s=mean_s, detect_s=1.0, restart_s=4.0, stall_s=0.3, **settings)  # type: ignore[arg-type]
    interval_s = formulas.best_interval_s(cfg.stall_s, mean_s)
    first = formulas.goodput(interval_s, cfg.stall_s, cfg.outage_s, mean_s)
    exact = formulas.goodput_exact(interval_s, cfg.stall_s, cfg.survived(mean_s), mean_s)
    return simulate(cfg, mean_s, interval_s), first, exact


@pytest.mark.parametrize(("mean_s", "ceiling"), [(60, 0.82), (180, 0.91), (300, 0.94), (600, 0.96), (3600, 0.98)])
def test_the_formula_gives_the_worked_ceilings(mean_s: float, ceiling: float) -> None:
    assert formulas.goodput(formulas.best_interval_s(0.3, mean_s), 0.3, 5.0, mean_s) == pytest.approx(
        ceiling, abs=0.006
    )


def test_the_best_interval_is_a_maximum() -> None:
    best = formulas.best_interval_s(0.3, 600)
    at = [formulas.goodput(best * factor, 0.3, 5, 600) for factor in (0.8, 1.0, 1.25)]
    assert max(at) == at[1]
    assert best == pytest.approx((2 * 0.3 * 600) ** 0.5)


@pytest.mark.parametrize("mean_s", [600, 3600, 45_000])
def test_formula_and_simulation_agree_where_faults_are_rare(mean_s: float) -> None:
    found, first, exact = simulated(mean_s, days=20, runs=60)
    assert found.goodput == pytest.approx(first, abs=0.002)
    assert found.goodput == pytest.approx(exact, abs=0.001)


def test_they_differ_where_faults_are_dense_and_the_exact_formula_does_not() -> None:
    found, first, exact = simulated(10, days=2, runs=60)
    assert found.goodput == pytest.approx(exact, abs=0.004)
    assert first < found.goodput - 0.02  # it counts losses as if each stood alone: the half of an interval twice
    assert found.low < found.goodput < found.high


def test_no_second_is_lost_to_nothing() -> None:
    found, _, _ = simulated(300, days=3, runs=20, replace_share=0.5, replace_s=60)
    losses = found.detect, found.restart, found.replay, found.checkpoint
    assert sum(losses) + found.goodput == pytest.approx(1)
    assert min(losses) > 0


def test_nodes_that_must_be_replaced_cost_more() -> None:
    plain, _, _ = simulated(600, days=5, runs=20)
    found, first, exact = simulated(600, days=5, runs=20, replace_share=0.5, replace_s=30)
    assert found.restart == pytest.approx(plain.restart + 0.5 * 30 / 600, abs=0.004)
    assert found.goodput == pytest.approx(exact, abs=0.003)
    assert found.goodput == pytest.approx(first, abs=0.005)


def test_faults_grow_with_gpus_as_llama_3_had_them() -> None:
    cfg = GoodputConfig()
    assert cfg.mean_s(4) / 86_400 == pytest.approx(528, rel=0.01)
    assert 54 * 86_400 / cfg.mean_s(16_384) == pytest.approx(419, rel=0.02)
    assert cfg.mean_s(4096) == pytest.approx(cfg.mean_s(8) / 512)
    assert pytest.approx(4.7e-4) == LLAMA_3_FAULTS


def test_the_same_seed_gives_the_same_table(capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for seed in (0, 0, 1):
        main(["gpus=[64,4096]", "runs=20", f"seed={seed}"])
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != shown[2]
    assert shown[0].count("\n") == 6


@pytest.mark.parametrize(
    ("word", "said"),
    [("gpus=[]", "must name numbers"), ("gpus=four", "key 'gpus"), ("days=[1", "cannot be read"),
     ("runs=0", "runs is 0"),
     ("replace_share=2", "between 0 and 1"), ("days", "not of the form key=value"), ("day=3", "unknown key 'day'"),
     ("interval_s=86400 mtbf_s=100", "nothing would ever be saved"), ("mtbf_s=1e-9", "a fault comes every 1e-09 s"),
     ("mtbf_s=1", "too many to simulate")],
)  # fmt: skip
def test_a_mistake_is_one_line(word: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        main(word.split())
    assert said in str(error.value)
