"""Validation: WER of nearest-token decoding, on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sm_train.data.batches import SpeechItems
from sm_train.data.target_set import TargetSet
from sm_train.train.engines import EngineConfig
from sm_train.train.engines.base import leave_ranks, start_ranks, sum_over_ranks
from sm_train.train.validate import NearestTokenWer
from tests import training


class Alone:
    """As much of an engine as validation needs."""

    def __init__(self) -> None:
        self.rank, self.world_size, self.device = start_ranks(EngineConfig(device="cpu"))

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return sum_over_ranks(values, self.device)


class Oracle(nn.Module):
    """A mapper that knows the targets: it finds the utterance by its features, and errs at the first word of some."""

    def __init__(self, items: SpeechItems, wrong: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.items, self.wrong, self.saw_training = items, wrong, False
        self.seen = self.calls = 0
        self.known = {items.collate(np.array([i])).feats_BTE[0, :4].numpy().tobytes(): i for i in range(len(items))}

    def forward(self, feats_BTE: Tensor, num_frames_B: Tensor) -> Tensor:
        self.saw_training |= self.training
        self.seen += len(feats_BTE)
        self.calls += 1
        targets = self.items.targets
        mapped_BPD = torch.full((len(feats_BTE), feats_BTE.shape[1] // 4, training.D), float("nan"))
        for b, num_frames in enumerate(num_frames_B.tolist()):
            item = self.known[feats_BTE[b, :4].numpy().tobytes()]
            rows = [*targets.rows_of(int(self.items.rows[item])), *[targets.pad_row] * 99][: num_frames // 4]
            if item in self.wrong:
                rows[0] = 1 + rows[0] % (len(training.WORDS) - 1)
            mapped_BPD[b, : len(rows)] = targets.rows_RD[rows]
        return mapped_BPD


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> SpeechItems:
    root = training.shard_set(tmp_path_factory.mktemp("validate") / "shards")
    return SpeechItems(root, TargetSet(root, training.TARGET), ["valid"])


def wer(items: SpeechItems, mapper: nn.Module, budget: int = 100, trim: str = "change_point") -> float:
    return NearestTokenWer(items, trim, budget)(Alone(), mapper)["valid_wer"]  # type: ignore[arg-type]


def test_exact_vectors_have_no_errors_and_wrong_ones_are_counted(items: SpeechItems) -> None:
    words = int(items.columns["num_tokens"].sum())
    assert wer(items, Oracle(items)) == 0.0
    assert wer(items, Oracle(items, frozenset({0, 3, 5}))) == pytest.approx(3 / words)


@pytest.mark.parametrize("budget", [5, 64, 10_000])
def test_the_budget_changes_nothing_even_where_an_utterance_is_above_it(items: SpeechItems, budget: int) -> None:
    made = NearestTokenWer(items, "change_point", budget)
    assert sorted(np.concatenate(made.batches.pieces).tolist()) == list(range(len(items)))
    assert wer(items, Oracle(items, frozenset({2})), budget) == wer(items, Oracle(items, frozenset({2})))


def test_without_trimming_pads_are_left_out_still(items: SpeechItems) -> None:
    assert wer(items, Oracle(items), trim="none") == 0.0


def test_the_mapper_is_evaluated_and_goes_back_to_training(items: SpeechItems) -> None:
    mapper = Oracle(items).train()
    wer(items, mapper)
    assert mapper.training
    assert not mapper.saw_training
    wer(items, mapper.eval())
    assert not mapper.training


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_work_and_agree(items: SpeechItems, tmp_path: Path, world_size: int) -> None:
    expected = {"valid_wer": wer(items, Oracle(items, frozenset({0, 3, 5})))}

    def work() -> None:
        engine = Alone()
        made = NearestTokenWer(items, "change_point", 10_000)  # one batch: some ranks have none and repeat it
        assert made(engine, Oracle(items, frozenset({0, 3, 5}))) == expected  # type: ignore[arg-type]
        mapper = Oracle(items, frozenset({0, 3, 5}))
        assert NearestTokenWer(items, "change_point", 64)(engine, mapper) == expected  # type: ignore[arg-type]
        assert 0 < mapper.seen < len(items)
        assert sum_over_ranks(torch.tensor([mapper.calls]), engine.device).item() == mapper.calls * world_size
        leave_ranks()

    assert training.in_ranks(world_size, work) == [0] * world_size


def test_the_vocabulary_is_the_table(items: SpeechItems) -> None:
    assert NearestTokenWer(items, "none", 100).vocabulary == len(training.WORDS)
