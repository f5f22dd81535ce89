"""From a plan to tensors: padding, counts, lanes, resuming, and verified reading."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sm_train.data.batches import Buffer, Columns, SpeechItems
from sm_train.data.loader import Loader, Step, plan_items
from sm_train.data.plan import Position
from sm_train.data.target_set import TargetSet
from sm_train.errors import UserError
from sm_train.records import MicroBatch
from tests import training


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training.shard_set(tmp_path_factory.mktemp("batches") / "shards")


@pytest.fixture(scope="module")
def items(root: Path) -> SpeechItems:
    return SpeechItems(root, TargetSet(root, training.TARGET), ["train"])


def counts(columns: Columns) -> Columns:
    return {"frames": columns["num_frames"], "tokens": columns["num_tokens"], "none": 0 * columns["num_tokens"]}


def loader(items: SpeechItems, rank: int = 0, world_size: int = 1, seed: int = 0) -> Loader:
    return Loader(items, counts, plan_items(items, seed, training.FRAMES, training.LANES), rank, world_size)


def first(made: Loader, count: int, position: Position | None = None) -> list[Step]:
    return list(itertools.islice(made.steps(position or Position(0, 0)), count))


def ordinals(step: Step) -> dict[int, list[int]]:
    return {lane: batch.ordinals.tolist() for lane, batch in step.batches}


def test_only_the_asked_splits_are_items(root: Path, items: SpeechItems) -> None:
    split_of = items.utterances.column("split").to_pylist()
    assert len(items) == 52
    assert {split_of[o] for o in items.ordinals} == {"train"}
    assert items.ids == [f"utt-{o:03d}" for o in items.ordinals]
    both = SpeechItems(root, items.targets, ["train", "valid"])
    assert len(both) == 60
    with pytest.raises(UserError, match="no utterance in split 'dev'; it has: train, valid"):
        SpeechItems(root, items.targets, ["dev"])


def test_a_micro_batch_is_the_samples_and_zeros_and_pads(items: SpeechItems) -> None:
    chosen = np.array([5, 0, 17])
    batch = items.collate(chosen)
    frames, tokens = batch.num_frames_B.tolist(), batch.num_tokens_B.tolist()
    assert len(set(frames)) == 3
    assert batch.feats_BTE.shape == (3, max(frames), training.E)
    assert batch.token_rows_BL.shape == (3, max(tokens))
    assert batch.feats_BTE.dtype == torch.float16
    assert frames == items.columns["num_frames"][chosen].tolist()
    assert tokens == items.columns["num_tokens"][chosen].tolist()
    assert batch.ordinals.tolist() == items.ordinals[chosen].tolist()
    for b, item in enumerate(chosen):
        ordinal = int(items.ordinals[item])
        feats_TE = items.feats[ordinal]["feats"]
        assert np.array_equal(batch.feats_BTE[b, : frames[b]].numpy(), feats_TE)
        assert (batch.feats_BTE[b, frames[b] :] == 0).all()
        text = " ".join(training.WORDS[r] for r in batch.token_rows_BL[b, : tokens[b]])
        assert text == items.utterances.column("text")[ordinal].as_py()
        assert (batch.token_rows_BL[b, tokens[b] :] == items.targets.pad_row).all()


def test_counts_and_hours_of_a_step_cover_all_lanes(items: SpeechItems) -> None:
    one_rank, of_two = first(loader(items), 6), first(loader(items, rank=1, world_size=2), 6)
    for step, half in zip(one_rank, of_two, strict=True):
        batches = [batch for _, batch in step.batches]
        assert step.counts["frames"] == sum(int(b.num_frames_B.sum()) for b in batches)
        assert step.counts["tokens"] == sum(int(b.num_tokens_B.sum()) for b in batches)
        assert step.counts["none"] == 0
        assert step.audio_s == pytest.approx(step.counts["frames"] / 25)
        padded = sum(b.feats_BTE.shape[0] * b.feats_BTE.shape[1] for b in batches)
        assert step.padding == pytest.approx(1 - step.counts["frames"] / padded)
        assert (half.counts, half.audio_s, half.padding) == (step.counts, step.audio_s, step.padding)
        assert len(half.batches) == 2


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_lanes_of_all_ranks_are_those_of_one(items: SpeechItems, world_size: int) -> None:
    expected = [ordinals(step) for step in first(loader(items), 7)]
    ranks = [first(loader(items, rank, world_size), 7) for rank in range(world_size)]
    for i, step in enumerate(expected):
        joined: dict[int, list[int]] = {}
        for rank in ranks:
            assert rank[i].position == ranks[0][i].position
            assert not joined.keys() & ordinals(rank[i]).keys()
            joined |= ordinals(rank[i])
        assert joined == step


def test_an_epoch_has_every_item_once_and_epochs_follow(items: SpeechItems) -> None:
    steps = first(loader(items), 40)
    seen: dict[int, list[int]] = {}
    for step in steps:
        seen.setdefault(step.position.epoch, []).extend(itertools.chain(*ordinals(step).values()))
    whole = [epoch for epoch in seen if epoch + 1 in seen]
    assert len(whole) >= 3
    for epoch in whole:
        assert sorted(seen[epoch]) == items.ordinals.tolist()


@pytest.mark.parametrize("world_size", [1, 2])
def test_from_any_position_the_later_items_are_the_same(items: SpeechItems, world_size: int) -> None:
    undisturbed = first(loader(items, world_size - 1, world_size), 12)
    for begun, step in enumerate(undisturbed):
        resumed = first(loader(items, world_size - 1, world_size), 12 - begun, step.position)
        for one, other in zip(resumed, undisturbed[begun:], strict=True):
            assert one.position == other.position
            assert ordinals(one) == ordinals(other)


def test_a_position_past_the_last_step_begins_the_next_epoch(items: SpeechItems) -> None:
    steps = first(loader(items), 12)
    last = next(i for i, step in enumerate(steps) if step.position.epoch == 1) - 1
    past = Position(0, steps[last].position.step + 1)
    assert first(loader(items), 1, past)[0].position == Position(1, 0)


def test_ranks_that_do_not_divide_the_lanes_are_an_error(items: SpeechItems) -> None:
    with pytest.raises(
        UserError, match=r"batch\.lanes is 4, which 3 ranks do not divide; start a number .* multiple of 3"
    ):
        loader(items, world_size=3)


def test_an_item_above_the_budget_is_named(items: SpeechItems) -> None:
    longest = items.ids[int(items.columns["num_frames"].argmax())]
    with pytest.raises(UserError, match=f"'{longest}'.*above the micro-batch budget of 20"):
        plan_items(items, 0, 20, 4)


def test_names_are_the_ids_of_the_lanes(items: SpeechItems) -> None:
    made = loader(items)
    step = first(made, 3)[2]
    ids = [f"utt-{o:03d}" for o in ordinals(step)[1] + ordinals(step)[3]]
    assert made.names(step.position, [1, 3], most=100) == ", ".join(ids)
    assert made.names(step.position, [1, 3], most=2) == f"{ids[0]}, {ids[1]} and {len(ids) - 2} more"


def copy_of(root: Path, folder: Path) -> Path:
    shutil.copytree(root, folder / "shards")
    return folder / "shards"


@pytest.mark.parametrize("place", ["part-0000000", f"targets/{training.TARGET}/part-0000000"])
def test_a_flipped_bit_is_an_error_that_names_the_utterance(root: Path, tmp_path: Path, place: str) -> None:
    damaged = copy_of(root, tmp_path)
    shard = damaged / place / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1  # in the last sample's last column
    shard.write_bytes(data)
    items = SpeechItems(damaged, TargetSet(damaged, training.TARGET), ["train", "valid"])
    items.collate(np.array([0, 58]))
    with pytest.raises(UserError, match=r"shard\.00000\.mds: the bytes of utterance 'utt-059' are not those"):
        items.collate(np.array([0, 59]))


def test_a_flipped_bit_in_the_embedding_is_an_error(root: Path, tmp_path: Path) -> None:
    damaged = copy_of(root, tmp_path)
    path = damaged / "targets" / training.TARGET / "embedding.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"embedding\.safetensors is not what was committed"):
        TargetSet(damaged, training.TARGET)


def test_a_target_set_that_is_not_there_is_an_error_that_lists_the_others(root: Path) -> None:
    with pytest.raises(UserError, match="no complete target set 'llama'; it has: words"):
        TargetSet(root, "llama")


class Chosen(NamedTuple):
    """A micro-batch that remembers what it was made of."""

    items: list[int]
    epoch: int

    def to(self, device: torch.device) -> Chosen:
        return self


class Some:
    """Items of which an epoch goes through some: those that leave its own remainder by three."""

    unit = "tokens"

    def __init__(self, unit_length: bool = False) -> None:
        sizes = np.random.default_rng(1).integers(3, 30, size=90)
        self.columns: Columns = {"size": sizes}
        self.lengths: NDArray[np.int64] = np.ones_like(sizes) if unit_length else sizes
        self.ids = [f"item-{i}" for i in range(90)]
        self.duration_s: NDArray[np.float64] = np.arange(90) / 4

    shard_of = None

    def of_epoch(self, epoch: int) -> NDArray[np.int64]:
        return np.flatnonzero(np.arange(90) % 3 == epoch % 3)

    def collate(self, items: NDArray[np.int64], epoch: int, buffer: Buffer | None = None) -> MicroBatch:
        return Chosen(items.tolist(), epoch)


def some_loader(items: Some, budget: int = 60, rank: int = 0, world_size: int = 1) -> Loader:
    return Loader(items, lambda columns: columns, plan_items(items, 2, budget, 2), rank, world_size)


def test_an_epoch_goes_through_the_items_that_are_chosen_for_it() -> None:
    items = Some()
    seen: dict[int, list[int]] = {}
    for step in first(some_loader(items), 60):
        chosen = [batch for _, batch in step.batches if isinstance(batch, Chosen)]
        of_step = [i for batch in chosen for i in batch.items]
        assert {batch.epoch for batch in chosen} == {step.position.epoch}
        assert step.counts == {"size": items.columns["size"][of_step].sum()}
        assert step.audio_s == pytest.approx(items.duration_s[of_step].sum())
        padded = sum(len(batch.items) * items.lengths[batch.items].max() for batch in chosen)
        assert step.padding == pytest.approx(1 - items.lengths[of_step].sum() / padded)
        assert all(len(batch.items) * items.lengths[batch.items].max() <= 60 for batch in chosen)
        seen.setdefault(step.position.epoch, []).extend(of_step)
    whole = [epoch for epoch in seen if epoch + 1 in seen]
    assert len(whole) >= 3
    for epoch in whole:
        assert sorted(seen[epoch]) == items.of_epoch(epoch).tolist()


def test_names_are_those_of_the_chosen_items_and_ranks_agree() -> None:
    steps = first(some_loader(Some()), 25)
    halves = [first(some_loader(Some(), rank=rank, world_size=2), 25) for rank in range(2)]
    for number, step in enumerate(steps):
        assert [half[number].batches[0] for half in halves] == step.batches
        assert [half[number].counts for half in halves] == [step.counts] * 2
        named = some_loader(Some()).names(step.position, [1], most=99)
        assert named == ", ".join(f"item-{i}" for i in step.batches[1][1].items)  # type: ignore[attr-defined]


def test_a_budget_above_is_named_in_the_items_own_unit() -> None:
    with pytest.raises(UserError, match=r"'item-\d+' has 29 padded tokens, .* budget of 20; raise batch\.tokens"):
        some_loader(Some(), budget=20)


def test_the_plan_s_fingerprint_follows_the_lengths_of_all_items() -> None:
    assert some_loader(Some()).planner.fingerprint == some_loader(Some(), rank=1, world_size=2).planner.fingerprint
    assert some_loader(Some()).planner.fingerprint != some_loader(Some(unit_length=True)).planner.fingerprint
