"""The plain-torch engine against torch's own AdamW, and what both engines share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sm_train.errors import UserError
from sm_train.records import Batch
from sm_train.train.engines import EngineConfig, TrainState, make_engine
from sm_train.train.engines import base as engines_base
from sm_train.train.engines.deepspeed import BUCKET, REUSE, zero_config
from tests.builders import ROOT, child_env
from tests.training import assert_equal


class Inner(nn.Module):
    """Two weights that are trained."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(torch.randn(3, 5, generator=generator))
        self.down = nn.Parameter(torch.randn(5, 1, generator=generator))

    def forward(self, x_B3: Tensor) -> Tensor:
        y: Tensor = torch.tanh(x_B3.to(self.up.dtype) @ self.up) @ self.down
        return y


class Outer(nn.Module):
    """The module that an engine holds: sums of a batch, with a table that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.table = torch.ones(1)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"error": (self.inner(batch.feats_BTE[:, 0]).float() - self.table).square().sum()}


def batch(seed: int) -> Batch:
    feats = torch.randn(4, 1, 3, generator=torch.Generator().manual_seed(seed))
    ones = torch.ones(4, dtype=torch.long)
    return Batch(feats, ones, ones[:, None], ones, np.arange(4))


def make(state: TrainState | None = None, **settings: object) -> engines_base.Engine:
    engine, module = make_engine(EngineConfig(device="cpu", **settings), lanes=2), Outer()  # type: ignore[arg-type]
    with engine.building():
        pass
    engine.prepare(module, module.inner, state)
    return engine


def take_step(engine: engines_base.Engine, number: int, scale: float = 1.0, lr: float = 1e-2) -> engines_base.Update:
    for lane in range(2):
        loss = scale * engine.forward(batch(10 * number + lane))["error"]
        engine.backward(loss, is_last=lane == 1)
    return engine.step(lr)


def weights(engine: engines_base.Engine) -> Mapping[str, Tensor]:
    state = engine.capture()
    assert state is not None
    return state.weights


def test_a_start_does_not_wait_for_torch_s_compiler() -> None:
    code = "import sys; from tests.unit.test_engines import make, take_step; take_step(make(), 0); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=child_env(), capture_output=True, text=True)
    assert "torch.optim.adamw" in done.stdout.split(), done.stderr
    assert "torch._dynamo" not in done.stdout.split()


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
def test_it_takes_the_steps_of_torch_s_adamw(clip: float) -> None:
    engine, module = make(clip=clip, weight_decay=0.1), Outer()
    reference = torch.optim.AdamW(module.inner.parameters(), betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1)
    for number in range(5):
        lr = 1e-2 * (number + 1)
        update = take_step(engine, number, lr=lr)
        sum(module(batch(10 * number + lane))["error"] for lane in range(2)).backward()  # type: ignore[union-attr]
        norm = torch.nn.utils.clip_grad_norm_(module.inner.parameters(), clip or float("inf"))
        reference.param_groups[0]["lr"] = lr
        reference.step()
        reference.zero_grad()
        assert (update.applied, update.scale) == (True, 1.0)
        assert update.grad_norm == pytest.approx(float(norm), rel=1e-5)
    for name, parameter in module.inner.named_parameters():
        torch.testing.assert_close(weights(engine)[name], parameter.detach(), rtol=1e-5, atol=1e-6)


def test_gradients_are_summed_and_cleared_by_the_step() -> None:
    engine, module = make(), Outer()
    for number in range(2):
        for lane in range(2):
            engine.backward(engine.forward(batch(lane))["error"], is_last=lane == 1)
        sum(module(batch(lane))["error"] for lane in range(2)).backward()  # type: ignore[union-attr]
        for name, parameter in module.inner.named_parameters():
            torch.testing.assert_close(engine.gradients()[name], parameter.grad)
        module.zero_grad()
        assert engine.step(0.0).applied, number


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_captured_state_goes_on_bit_equal(precision: str) -> None:
    one = make(precision=precision)
    for number in range(3):
        take_step(one, number)
    other = make(one.capture(), precision=precision)
    for number in range(3, 6):
        assert take_step(one, number) == take_step(other, number)
    states = [one.capture(), other.capture()]
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        assert_equal(getattr(states[0], kind), getattr(states[1], kind))
    assert [state.adam_step for state in states if state] == [6, 6]


def test_a_captured_state_is_a_copy() -> None:
    engine = make()
    state = engine.capture()
    assert state is not None
    before = {name: tensor.clone() for name, tensor in state.weights.items()}
    take_step(engine, 0)
    assert_equal(state.weights, before)
    assert not torch.equal(weights(engine)["up"], before["up"])


def test_in_bf16_masters_stay_fp32() -> None:
    engine = make(precision="bf16")
    assert {p.dtype for p in engine.module.parameters()} == {torch.bfloat16}
    start = weights(engine)["up"]
    assert torch.equal(start, Outer().inner.up)  # not rounded
    for number in range(20):
        take_step(engine, number, lr=1e-5)  # below half a bf16 step of most weights
    moved = weights(engine)
    assert {tensor.dtype for tensor in moved.values()} == {torch.float32}
    assert (moved["up"] != start).all()
    assert torch.equal(engine.module.get_parameter("inner.up"), moved["up"].bfloat16())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_moves_nothing(bad: float) -> None:
    engine = make()
    take_step(engine, 0)
    before = engine.capture()
    update = take_step(engine, 1, scale=bad)
    assert not update.applied
    after = engine.capture()
    assert before is not None
    assert after is not None
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        assert_equal(getattr(before, kind), getattr(after, kind))
    assert after.adam_step == 1
    assert take_step(engine, 2).applied
    assert all(torch.isfinite(tensor).all() for tensor in weights(engine).values())


def test_a_state_can_be_captured_before_the_first_update() -> None:
    engine = make()
    assert not take_step(engine, 0, scale=float("nan")).applied
    state = engine.capture()
    assert state is not None
    assert state.adam_step == 0
    other = make(state)
    assert take_step(engine, 1) == take_step(other, 1)
    assert_equal(weights(engine), weights(other))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "horovod"}, "engine.name is 'horovod'; it must be one of local, deepspeed"),
        ({"name": "local", "precision": "fp16"}, "fp16 needs engine.name deepspeed"),
        ({"name": "deepspeed", "precision": "fp16"}, "fp16 is not supported on a CPU"),
    ],
)
def test_what_cannot_run_is_an_error(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        make(**settings)


@pytest.mark.parametrize(("name", "value"), [("precision", "fp8"), ("zero_stage", 4)])
def test_unknown_settings_are_errors(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"engine.{name} is {value!r}".replace(".", r"\.")):
        EngineConfig(**{name: value})  # type: ignore[arg-type]


def test_weights_of_another_shape_are_an_error_that_names_the_parameter() -> None:
    state = make().capture()
    assert state is not None
    state.weights["up"] = torch.zeros(3, 6)
    with pytest.raises(UserError, match=r"parameter 'up' has the shape \(3, 6\), the mapper's is \(3, 5\)"):
        make(state)
    del state.weights["up"]
    with pytest.raises(UserError, match=r"parameter 'up' has the shape None"):
        make(state)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_deepspeed_accumulates_and_reduces_in_fp32(precision: str) -> None:
    settings = zero_config(EngineConfig(precision=precision, zero_stage=2, clip=0.3), 6, torch.device("cpu"))
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    assert settings["communication_data_type"] == "fp32"
    assert settings["gradient_accumulation_steps"] == 6
    assert settings["gradient_clipping"] == 0.3
    assert (settings["bf16"]["enabled"], settings["fp16"]["enabled"]) == (precision == "bf16", precision == "fp16")


def test_stage_3_partitions_and_offload_leaves_weights_in_host_memory() -> None:
    cpu, sizes = torch.device("cpu"), {"stage": 3, "reduce_bucket_size": BUCKET, "stage3_max_reuse_distance": REUSE}
    assert zero_config(EngineConfig(zero_stage=3), 2, cpu)["zero_optimization"] == sizes
    for device, pinned in ((cpu, False), (torch.device("cuda"), True)):
        zero = zero_config(EngineConfig(zero_stage=3, offload=True), 2, device)["zero_optimization"]
        assert zero == {**sizes, "offload_param": {"device": "cpu", "pin_memory": pinned}}
    with pytest.raises(ValueError, match=r"engine\.offload needs engine\.zero_stage 3; it is 1"):
        EngineConfig(offload=True)


class Around(Outer):
    """The module with a frozen part, in the precision it was loaded in."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3, dtype=torch.float32).eval().requires_grad_(False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_what_is_trained_is_cast_moved_and_captured(precision: str) -> None:
    engine, module = make_engine(EngineConfig(device="cpu", precision=precision, weight_decay=0.5), lanes=2), Around()
    before = module.frozen.weight.clone()
    engine.prepare(module, module.inner, None)
    assert engine.module is module
    for number in range(3):
        assert take_step(engine, number).applied
    assert torch.equal(module.frozen.weight, before)
    assert module.frozen.weight.dtype == torch.float32
    assert module.frozen.weight.grad is None
    assert set(weights(engine)) == set(engine.gradients()) == {"up", "down"}
    assert not torch.equal(weights(engine)["up"], Outer().inner.up)


@pytest.mark.parametrize(
    ("name", "value"),
    [("timeout_s", 0), ("timeout_s", float("nan")), ("heartbeat_s", 0.5), ("heartbeat_s", float("inf")), ("clip", -1),
     ("split", 0)],
)  # fmt: skip
def test_settings_that_no_engine_can_take_are_errors(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"engine\.{name} is"):
        EngineConfig(**{name: value})  # type: ignore[arg-type]
