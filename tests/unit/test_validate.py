"""Validation: WER of nearest-token decoding and the losses on held-out instructions, on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sm_train.data.batches import SpeechItems
from sm_train.data.instructions import IGNORED, InstructionItems
from sm_train.data.target_set import TargetSet
from sm_train.records import PromptedBatch
from sm_train.train.engines import EngineConfig
from sm_train.train.engines.base import leave_ranks, start_ranks, sum_over_ranks
from sm_train.train.engines.watch import Watch
from sm_train.train.objectives.instruct import InstructObjective
from sm_train.train.validate import InstructionLosses, NearestTokenWer
from tests import training, tuning


class Alone:
    """As much of an engine as validation needs."""

    def __init__(self) -> None:
        self.rank, self.world_size, self.device = start_ranks(EngineConfig(device="cpu"))
        self.watch = Watch(self.rank, self.world_size, 0, 600)

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
    cuts = {b: len(NearestTokenWer(items, "change_point", b).batches.pieces) for b in range(60, 140)}
    budget = next(b for b, count in cuts.items() if count > world_size and count % world_size)

    def work() -> None:
        engine = Alone()
        made = NearestTokenWer(items, "change_point", 10_000)  # one batch: some ranks have none and repeat it
        assert made(engine, Oracle(items, frozenset({0, 3, 5}))) == expected  # type: ignore[arg-type]
        mapper = Oracle(items, frozenset({0, 3, 5}))
        found = NearestTokenWer(items, "change_point", budget)(engine, mapper)  # type: ignore[arg-type]
        assert found == expected  # a repeated batch counts once
        assert 0 < mapper.seen < len(items)
        assert sum_over_ranks(torch.tensor([mapper.calls]), engine.device).item() == mapper.calls * world_size
        leave_ranks()

    assert training.in_ranks(world_size, work) == [0] * world_size


def test_the_vocabulary_is_the_table(items: SpeechItems) -> None:
    assert NearestTokenWer(items, "none", 100).vocabulary == len(training.WORDS)


# ---- the losses of stage 2


class Holding(Alone):
    """As much of an engine as the losses need: it remembers what it fed, and how."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module, self.fed = module, []  # type: ignore[var-annotated]

    def forward(self, batch: PromptedBatch) -> dict[str, Tensor]:
        assert not torch.is_grad_enabled()
        assert not self.module.mapper.training
        self.fed.append(batch)
        sums: dict[str, Tensor] = self.module(batch)
        return sums


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuning.Small:
    return tuning.small(tmp_path_factory.mktemp("losses"), "llama3", spare=(3, 0, 1))


def by_hand(items: InstructionItems, objective: InstructObjective) -> dict[str, float]:
    """Sums of each item alone over the counts of all."""
    totals = dict.fromkeys((*objective.weights, "accuracy"), 0.0)
    tokens, positions = 0, {term: 0 for term in objective.weights if term != "ce"}
    objective.eval()
    for i in range(len(items)):
        batch = items.collate(np.array([i]), 0)
        with torch.no_grad():
            sums = objective(batch)
        for term in totals:
            totals[term] += float(sums[term])
        tokens += int((batch.answer_ids_BA != IGNORED).sum())
        spoken, words = int(batch.speech.num_frames_B[0]) // 4, int(batch.speech.num_tokens_B[0])
        of_item = {"word": min(words + 1, spoken), "pad": max(spoken - words - 1, 0)}
        positions = {term: count + of_item[term] for term, count in positions.items()}
    objective.train()
    means = {"ce": totals["ce"] / tokens, **{term: totals[term] / positions[term] for term in positions}}
    loss = sum(weight * means[term] for term, weight in objective.weights.items())
    return {"valid_loss": loss, "valid_ce": means["ce"], "valid_accuracy": totals["accuracy"] / tokens}


@pytest.mark.parametrize("budget", [1, 100, 10_000])
@pytest.mark.parametrize("sigma", [0.9, 0.0])
def test_losses_are_those_of_each_item_by_hand(world: tuning.Small, sigma: float, budget: int) -> None:
    objective = world.objective(sigma=sigma)
    found = InstructionLosses(world.items, budget)(Holding(objective), objective)  # type: ignore[arg-type]
    assert found == pytest.approx(by_hand(world.items, objective), rel=1e-5)
    assert next(iter(found)) == "valid_loss"  # the figure that a run is judged by
    assert found["valid_ce"] > 0


def test_losses_are_taken_in_evaluation_and_training_goes_on(world: tuning.Small) -> None:
    objective = world.objective().train()
    engine = Holding(objective)
    InstructionLosses(world.items, 100)(engine, objective)  # type: ignore[arg-type]
    assert objective.mapper.training
    assert not any(module.training for module in objective.llm.modules())
    assert len(engine.fed) > 2
    assert all(p.grad is None for p in objective.parameters())


def test_losses_ask_in_the_first_epoch_s_words_each_time(world: tuning.Small) -> None:
    objective = world.objective()
    losses = InstructionLosses(world.items, 100)
    engines = [Holding(objective), Holding(objective)]
    first, again = (losses(engine, objective) for engine in engines)  # type: ignore[arg-type]
    assert first == again
    pieces = losses.batches.pieces
    assert sorted(np.concatenate(pieces).tolist()) == list(range(len(world.items)))
    for piece, one, other in zip(pieces, *(engine.fed for engine in engines), strict=True):
        expected = world.items.collate(piece, 0)
        assert torch.equal(one.ids_BL, expected.ids_BL)
        assert torch.equal(other.ids_BL, expected.ids_BL)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_take_equally_many_batches_and_count_each_item_once(world: tuning.Small, world_size: int) -> None:
    objective = world.objective()
    alone = Holding(objective)
    budget = next(b for b in range(80, 400) if len(InstructionLosses(world.items, b).batches.pieces) % world_size)
    expected = InstructionLosses(world.items, budget)(alone, objective)  # type: ignore[arg-type]
    assert len(alone.fed) % world_size

    def work() -> None:
        engine = Holding(objective)
        found = InstructionLosses(world.items, budget)(engine, objective)  # type: ignore[arg-type]
        assert found == pytest.approx(expected, rel=1e-9)
        assert len(engine.fed) == -(-len(alone.fed) // world_size)
        leave_ranks()

    assert training.in_ranks(world_size, work) == [0] * world_size
