"""The training loop: what a loss or a gradient that is not finite does, and what each step leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from sm_train import pretrain
from sm_train.data.batches import Columns
from sm_train.data.loader import Loader, Step, plan_items
from sm_train.data.plan import EpochPlan, Position
from sm_train.errors import UserError
from sm_train.records import Batch
from sm_train.train import checkpoint, start
from sm_train.train.engines import Engine
from sm_train.train.loop import LoopConfig
from sm_train.train.objectives.padded import PaddedObjective, PaddedRegression
from tests import training

BAD = 19  # the ordinal of one utterance


class NoLoss(PaddedObjective):
    """The loss of one utterance is NaN."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        sums = super().forward(batch)
        return {**sums, "word": sums["word"] * (float("nan") if BAD in batch.ordinals else 1.0)}


class NoGradient(PaddedObjective):
    """The loss of one utterance is finite, its gradient is not."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        sums = super().forward(batch)
        if BAD in batch.ordinals:
            sums["word"] = sums["word"] + (self.mapper.head.bias[0] * 0.0).abs().sqrt()
        return sums


@pytest.fixture(scope="module")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training.shard_set(tmp_path_factory.mktemp("loop") / "shards")


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """The engines that runs made, in order."""
    made: list[Engine] = []
    real: Callable[..., Engine] = start.make_engine

    def remember(*args: object) -> Engine:
        made.append(real(*args))
        return made[-1]

    monkeypatch.setattr(start, "make_engine", remember)
    return made


def place_of_bad(path: Path) -> tuple[Position, int, list[str], int]:
    """Position and lane of the bad utterance, the ids of that lane, and the global step (from 1)."""
    cfg = training.load(path)
    items = pretrain.Sources(cfg.shards, cfg.target).training(cfg.splits, cfg.seed)
    loader = Loader(
        items, lambda columns: columns, plan_items(items, cfg.seed, cfg.batch.frames, cfg.batch.lanes), 0, 1
    )
    for number, step in enumerate(loader.steps(Position(0, 0)), start=1):
        for lane, batch in step.batches:
            if BAD in batch.ordinals:
                return step.position, lane, [f"utt-{o:03d}" for o in batch.ordinals], number
    raise AssertionError


def weights(engine: Engine) -> dict[str, Tensor]:
    state = engine.capture()
    assert state is not None
    return dict(state.weights)


def test_every_step_has_a_line_with_what_it_did(shard_folder: Path, tmp_path: Path) -> None:
    path = training.write_config(tmp_path / "run.yaml", shard_folder)
    training.train(path)
    lines = training.metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 11))
    for line in lines:
        loss = 5 * line["loss_word"] + 5 * line.get("loss_pad", 0.0) - 20 * line["loss_cos"]
        assert line["loss"] == pytest.approx(loss, rel=1e-12)
        assert {"lr", "grad_norm", "scale", "skipped", "audio_h_per_s", "padding", "loader_wait_s", "step_s",
                "peak_memory_mb", "epoch", "attempt", "time_s"} <= line.keys()  # fmt: skip
    assert [line["step"] for line in lines if "valid_wer" in line] == [5, 10]
    assert [line["step"] for line in lines if "checkpoint_s" in line] == [4, 6, 7, 10]  # the stall before these steps
    assert lines[0]["lr"] == pytest.approx(1.5e-3)
    assert lines[-1]["loss"] < lines[0]["loss"]
    state = json.loads((tmp_path / "run/checkpoints/latest/state.json").read_text())
    assert (state["global_step"], state["adam_step"], state["scaler"]) == (10, 10, None)


@pytest.mark.parametrize("ahead", [0, 2])
def test_nothing_beyond_the_last_step_is_asked_for(
    shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    real = Loader._step

    def failing(self: Loader, epoch_plan: EpochPlan, position: Position, *rest: Any) -> Step:
        if position.step >= 3:
            raise UserError("the sample of a step beyond the last is damaged")
        return real(self, epoch_plan, position, *rest)

    monkeypatch.setattr(Loader, "_step", failing)
    path = training.write_config(tmp_path / "run.yaml", shard_folder, loop={"steps": 3})
    training.train(path, f"loader.read_ahead={ahead}")
    assert (tmp_path / "run/checkpoints/latest").resolve().name == "step-3"
    with pytest.raises(UserError, match="beyond the last is damaged"):
        training.train(path, f"loader.read_ahead={ahead}", "loop.steps=4")


def test_a_best_that_could_not_be_saved_is_forgotten(
    shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, real = iter([0.1, 0.5, 0.7, 0.6, 0.9]), checkpoint._write

    def full(aside: Path, saved: checkpoint.Checkpoint, description: Any) -> None:
        if saved.global_step == 2:
            raise OSError(28, "No space left on device")
        real(aside, saved, description)

    monkeypatch.setattr(checkpoint, "_write", full)
    monkeypatch.setattr(pretrain, "_validation", lambda *_: lambda: {"valid_wer": next(found)})
    path = training.write_config(tmp_path / "run.yaml", shard_folder)
    training.train(path, "loop.validate_every=2", "loop.save_every=10", "loop.save_error=go_on", "loop.keep=9")
    best = json.loads((tmp_path / "run/checkpoints/best/state.json").read_text())
    assert (best["global_step"], best["best_valid"]) == (4, 0.5)


def test_a_validation_that_is_not_finite_is_never_the_best(
    shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([float("nan"), 3.0, 2.0, float("inf"), float("nan")])
    monkeypatch.setattr(pretrain, "_validation", lambda *_: lambda: {"valid_wer": next(found)})
    path = training.write_config(tmp_path / "run.yaml", shard_folder)
    training.train(path, "loop.validate_every=2", "loop.save_every=10", "loop.keep=9")
    state = json.loads((tmp_path / "run/checkpoints/best/state.json").read_text())
    assert (state["global_step"], state["best_valid"]) == (6, 2.0)


def test_training_learns_the_words(shard_folder: Path, tmp_path: Path) -> None:
    wide = {"widths": [training.E, 32, 64], "feed_forward": 64, "dropout": 0.0}
    path = training.write_config(
        tmp_path / "run.yaml", shard_folder, mapper=wide,
        loop={"steps": 150, "validate_every": 150, "save_every": 150, "log_every": 150}, schedule={"lr": 1e-2},
        batch={"frames": 400},
    )  # fmt: skip
    training.train(path, "valid_splits=[train]")
    assert training.metrics(tmp_path / "run")[-1]["valid_wer"] < 0.3


def test_a_term_that_no_item_has_is_left_out(
    shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoPads(PaddedRegression):
        def counts(self, columns: Columns) -> dict[str, NDArray[np.int64]]:
            return {**super().counts(columns), "pad": 0 * columns["num_frames"]}

    monkeypatch.setattr(pretrain, "PaddedRegression", NoPads)
    training.train(training.write_config(tmp_path / "run.yaml", shard_folder, loop={"steps": 2, "validate_every": 0}))
    for line in training.metrics(tmp_path / "run"):
        assert "loss_pad" not in line
        assert line["loss"] == pytest.approx(5 * line["loss_word"] - 20 * line["loss_cos"], rel=1e-12)


def test_a_loss_that_is_not_finite_stops_before_the_weights_move(
    shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engines: list[Engine]
) -> None:
    path = training.write_config(tmp_path / "run.yaml", shard_folder)
    position, lane, names, number = place_of_bad(path)
    training.train(path, f"loop.steps={number - 1}", "run=" + str(tmp_path / "before"), "schedule.shape=constant")
    monkeypatch.setattr(pretrain, "PaddedObjective", NoLoss)
    where = f"not finite at epoch {position.epoch}, step {position.step}, lane {lane}: utterances"
    with pytest.raises(UserError, match=where) as raised:
        training.train(path, "schedule.shape=constant")
    named = str(raised.value).partition("utterances ")[2]
    assert f"utt-{BAD:03d}" in names
    assert named.split(" and ")[0].split(", ") == names[:8]
    training.assert_equal(weights(engines[0]), weights(engines[1]))
    assert len(training.metrics(tmp_path / "run")) == number - 1


def test_two_ranks_stop_together(shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "PaddedObjective", NoLoss)
    path = training.write_config(tmp_path / "run.yaml", shard_folder)
    _, lane, _, _ = place_of_bad(path)

    def work() -> None:
        import os

        with pytest.raises(UserError, match=f"not finite at epoch 0.* lane {lane}: utterances") as raised:
            training.train(path)
        (tmp_path / f"rank{os.environ['RANK']}").write_text(str(raised.value))

    assert training.in_ranks(2, work) == [0, 0]
    assert (tmp_path / "rank0").read_text() == (tmp_path / "rank1").read_text()


def test_a_gradient_that_is_not_finite_stops(
    shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engines: list[Engine]
) -> None:
    monkeypatch.setattr(pretrain, "PaddedObjective", NoGradient)
    path = training.write_config(tmp_path / "run.yaml", shard_folder)
    position, _, _, number = place_of_bad(path)
    with pytest.raises(UserError, match=f"the gradient is not finite at epoch {position.epoch}, step {position.step} .*"
                       r"utterances utt-.*lower schedule\.lr"):  # fmt: skip
        training.train(path)
    assert all(torch.isfinite(tensor).all() for tensor in weights(engines[0]).values())
    assert len(training.metrics(tmp_path / "run")) == number - 1


def test_nonfinite_skip_leaves_the_update_out_and_counts_it(
    shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "PaddedObjective", NoGradient)
    path = training.write_config(tmp_path / "run.yaml", shard_folder, loop={"nonfinite": "skip", "steps": 8})
    number = place_of_bad(path)[3]
    training.train(path)
    lines = training.metrics(tmp_path / "run")
    skipped = [line["step"] for line in lines if line["skipped"]]
    assert number in skipped
    assert len(skipped) == len({line["epoch"] for line in lines})  # once an epoch
    assert [line["grad_norm"] for line in lines if line["skipped"]] == [None] * len(skipped)
    assert "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()
    state = json.loads((tmp_path / "run/checkpoints/latest/state.json").read_text())
    assert (state["global_step"], state["adam_step"]) == (8, 8 - len(skipped))


def test_skips_without_end_are_an_error(shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Never(PaddedObjective):
        def forward(self, batch: Batch) -> dict[str, Tensor]:
            sums = super().forward(batch)
            return {**sums, "word": sums["word"] + (self.mapper.head.bias[0] * 0.0).abs().sqrt()}

    monkeypatch.setattr(pretrain, "PaddedObjective", Never)
    path = training.write_config(tmp_path / "run.yaml", shard_folder)
    with pytest.raises(UserError, match=r"skipped 21 in a row"):
        training.train(path, "loop.nonfinite=skip", "loop.steps=50", "loop.save_every=1", "valid_splits=[]")
    state = json.loads((tmp_path / "run/checkpoints/latest/state.json").read_text())
    assert (state["global_step"], state["adam_step"]) == (20, 0)


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("save_every", 0), ("keep", 0), ("nonfinite", "ignore"),
                                              ("validate_every", -1), ("save_error", "ignore")])  # fmt: skip
def test_bad_settings_are_errors(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"loop.{name} is".replace(".", r"\.")):
        LoopConfig(**{name: value})  # type: ignore[arg-type]
