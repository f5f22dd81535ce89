"""The learning rate."""

from __future__ import annotations

import math

import pytest

from sm_train.train.schedule import ScheduleConfig, learning_rate


def rates(cfg: ScheduleConfig, num_steps: int) -> list[float]:
    return [learning_rate(cfg, step, num_steps) for step in range(num_steps)]


def test_warm_up_is_linear_and_no_step_has_a_rate_of_zero() -> None:
    assert rates(ScheduleConfig(lr=1.0, warmup_steps=4, shape="constant"), 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_the_cosine_goes_from_the_peak_to_the_floor() -> None:
    cfg = ScheduleConfig(lr=2.0, warmup_steps=10, floor=0.1)
    made = rates(cfg, 110)
    assert made[10] == 2.0
    assert made[60] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert made[35] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))
    assert made[10:] == sorted(made[10:], reverse=True)
    assert learning_rate(cfg, 110, 110) == pytest.approx(0.2)
    assert learning_rate(cfg, 500, 110) == pytest.approx(0.2)  # a run that was lengthened never leaves the floor


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert learning_rate(ScheduleConfig(lr=3.0), 0, 10) == 3.0


@pytest.mark.parametrize("num_steps", [1, 5])
def test_a_run_no_longer_than_its_warm_up(num_steps: int) -> None:
    assert rates(ScheduleConfig(lr=1.0, warmup_steps=5), num_steps) == [0.2, 0.4, 0.6, 0.8, 1.0][:num_steps]


def test_another_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"schedule\.shape is 'linear'; it must be cosine or constant"):
        ScheduleConfig(shape="linear")
