"""One step: what is skipped, what is an error, and how micro-batches are run in pieces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sm_train.data.batches import SpeechItems
from sm_train.data.plan import Position
from sm_train.data.target_set import TargetSet
from sm_train.errors import UserError
from sm_train.train.engines import Update
from sm_train.train.objectives.padded import PaddedObjective
from sm_train.train.step import check_update, dropout_seed
from tests import training


def test_in_fp16_a_skipped_step_is_the_scaler_at_work() -> None:
    class Names:
        lanes = 1

        def names(self, position: Position, lanes: list[int]) -> str:
            return "utt-000"

    class Step:
        position = Position(0, 0)

    def judged(update: Update, skips_in_a_row: int) -> int:
        return check_update("stop", update, Names(), Step(), skips_in_a_row)  # type: ignore[arg-type]

    skips = 0
    for number in range(20):
        skips = judged(Update(1.0, False, 2.0**16), skips)
        assert skips == number + 1
    assert judged(Update(1.0, True, 2.0**16), skips) == 0
    with pytest.raises(UserError, match="skipped 21 in a row"):
        judged(Update(1.0, False, 2.0), 20)


def test_dropout_differs_by_seed_epoch_step_and_lane() -> None:
    seeds = {
        dropout_seed(seed, Position(epoch, step), lane)
        for seed in range(3) for epoch in range(3) for step in range(3) for lane in range(3)
    }  # fmt: skip
    assert len(seeds) == 81
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.fixture(scope="module")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training.shard_set(tmp_path_factory.mktemp("step") / "shards")


@pytest.mark.parametrize("split", [2, 3, 50])
def test_a_step_in_pieces_has_the_same_gradient(shard_folder: Path, tmp_path: Path, split: int) -> None:
    path = training.write_config(tmp_path / "run.yaml", shard_folder, mapper={"dropout": 0.0})
    found = []
    for pieces in (1, split):
        out = tmp_path / f"{pieces}.safetensors"
        assert training.in_ranks(
            1, lambda out=out, pieces=pieces: training.first_gradients(path, out, f"engine.split={pieces}")
        ) == [0]  # type: ignore[misc]
        found.append(load_file(out))
    assert training.relative_difference(found[1], found[0]) < 1e-6


def test_a_piece_is_some_items_as_wide_as_its_longest(shard_folder: Path) -> None:
    items = SpeechItems(shard_folder, TargetSet(shard_folder, training.TARGET), ["train"])
    batch = items.collate(np.arange(7))
    assert batch.split(1) == [batch]
    pieces = batch.split(3)
    assert [len(piece.ordinals) for piece in pieces] == [3, 3, 1]
    for first, piece in zip((0, 3, 6), pieces, strict=True):
        alone = items.collate(np.arange(first, min(first + 3, 7)))
        assert all(torch.equal(a, b) for a, b in zip(piece[:4], alone[:4], strict=True))
        assert piece.ordinals.tolist() == alone.ordinals.tolist()


def test_a_device_without_memory_is_one_line_with_the_remedy(
    shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(PaddedObjective, "forward", full)
    path = training.write_config(tmp_path / "run.yaml", shard_folder)
    with pytest.raises(UserError, match=r"memory of cpu is full in lane 0 .* items of up to \d+ frames .*2\.00 GiB.*"
                                        r"engine\.split=4"):  # fmt: skip
        training.train(path, "engine.split=2")
