"""Reading ahead: the same steps, in memory that goes round, with errors where they belong."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sm_train.data.batches import Buffer, SpeechItems
from sm_train.data.loader import Loader, LoaderConfig, Step, plan_items
from sm_train.data.plan import Position
from sm_train.data.target_set import TargetSet
from sm_train.errors import UserError
from sm_train.records import Batch
from tests import training


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> SpeechItems:
    root = training.shard_set(tmp_path_factory.mktemp("loader") / "shards")
    return SpeechItems(root, TargetSet(root, training.TARGET), ["train"])


class Watched(SpeechItems):
    """Items that note what was asked of them, and fail at one call."""

    fails_at = -1

    def __init__(self, items: SpeechItems) -> None:
        self.__dict__.update(items.__dict__)
        self.calls = 0
        self.buffers: set[int] = set()
        self.threads: set[str] = set()

    def collate(self, items: NDArray[np.int64], epoch: int = 0, buffer: Buffer | None = None) -> Batch:
        self.calls += 1
        self.buffers.add(id(buffer))
        self.threads.add(threading.current_thread().name)
        if self.calls == self.fails_at:
            raise UserError("the bytes of utterance 'utt-007'")
        return super().collate(items, epoch, buffer)


def loader(items: SpeechItems, read_ahead: int, rank: int = 0, world_size: int = 1) -> Loader:
    planner = plan_items(items, 0, training.FRAMES, training.LANES)
    return Loader(items, lambda columns: columns, planner, rank, world_size, read_ahead)


def values(step: Step) -> tuple[object, ...]:
    """All of a step but the waiting, copied."""
    batches = [(lane, *(t.clone().numpy().tobytes() for t in batch[:4]), *batch[4]) for lane, batch in step.batches]  # type: ignore[index]
    return step.position, batches, dict(step.counts), step.audio_s, step.padding, step.items_hash


@pytest.mark.parametrize("read_ahead", [1, 2, 5])
def test_the_steps_are_the_same_with_any_read_ahead(items: SpeechItems, read_ahead: int) -> None:
    expected = [values(step) for step in itertools.islice(loader(items, 0).steps(Position(0, 2)), 20)]
    found = [values(step) for step in itertools.islice(loader(items, read_ahead).steps(Position(0, 2)), 20)]
    assert found == expected
    assert expected[-1][0].epoch >= 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("read_ahead", [0, 1, 3])
def test_a_step_is_valid_until_the_next_is_asked_for_and_memory_goes_round(items: SpeechItems, read_ahead: int) -> None:
    watched = Watched(items)
    fresh = iter(loader(items, 0).steps(Position(0, 0)))
    for step in itertools.islice(loader(watched, read_ahead).steps(Position(0, 0)), 25):
        while watched.calls < 4 * read_ahead:  # the reader is as far ahead as it gets
            pass
        assert values(step) == values(next(fresh))
    assert len(watched.buffers) == 4 * (read_ahead + 2)


def test_a_buffer_gives_the_same_memory_while_it_is_large_enough() -> None:
    buffer = Buffer()
    first = buffer.take((4, 10, 8))
    assert (first.shape, first.dtype) == ((4, 10, 8), torch.float16)
    assert buffer.take((2, 3, 8)).data_ptr() == first.data_ptr()
    assert buffer.take((5, 10, 8)).shape == (5, 10, 8)


def test_an_error_is_raised_with_its_own_type_where_its_step_is_asked_for(items: SpeechItems) -> None:
    for read_ahead in (0, 2):
        watched = Watched(items)
        watched.fails_at = 4 * 3 + 2  # in the fourth step
        steps = loader(watched, read_ahead).steps(Position(0, 0))
        for _ in range(3):
            next(steps)
        with pytest.raises(UserError, match="utt-007"):
            next(steps)
        with pytest.raises(StopIteration):
            next(steps)


def test_a_reader_ends_with_its_steps(items: SpeechItems) -> None:
    watched = Watched(items)
    steps = loader(watched, 2).steps(Position(0, 0))
    next(steps)
    (name,) = watched.threads
    assert name.startswith("read-ahead")
    assert name in {thread.name for thread in threading.enumerate()}
    steps.close()  # type: ignore[attr-defined]
    assert name not in {thread.name for thread in threading.enumerate()}
    calls = watched.calls
    assert calls <= 4 * 4
    with pytest.raises(StopIteration):
        next(steps)


def test_waiting_is_what_the_rank_waited(items: SpeechItems) -> None:
    for read_ahead in (0, 2):
        steps = loader(items, read_ahead).steps(Position(0, 0))
        assert all(0 < step.wait_s < 60 for step in itertools.islice(steps, 3))


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_hash_of_a_step_is_every_rank_s_and_follows_the_items_and_their_lanes(
    items: SpeechItems, world_size: int
) -> None:
    alone = [step.items_hash for step in itertools.islice(loader(items, 0).steps(Position(0, 0)), 8)]
    for rank in range(world_size):
        steps = loader(items, 1, rank, world_size).steps(Position(0, 0))
        assert [step.items_hash for step in itertools.islice(steps, 8)] == alone
    assert len(set(alone)) == 8
    made = loader(items, 0)
    lanes = [np.array([1, 2]), np.array([3])]
    others = [[np.array([1]), np.array([2, 3])], [np.array([2, 1]), np.array([3])], [np.array([3]), np.array([1, 2])]]
    assert made._hash(lanes) not in {made._hash(other) for other in others}


def test_two_threads_may_read_one_target_set(items: SpeechItems) -> None:
    expected = [items.targets.rows_of(row).tolist() for row in range(60)]
    found: list[list[list[int]]] = []

    def read() -> None:
        found.append([items.targets.rows_of(row).tolist() for row in range(60)])

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


@pytest.mark.parametrize(("name", "value"), [("read_ahead", -1), ("cache_limit_gb", 0.0)])
def test_a_setting_out_of_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"loader.{name} is {value}"):
        LoaderConfig(**{name: value})  # type: ignore[arg-type]


def test_runs_take_the_key(tmp_path: Path) -> None:
    root = training.shard_set(tmp_path / "shards", 30)
    losses = []
    for read_ahead in (0, 3):
        path = training.write_config(tmp_path / f"run{read_ahead}.yaml", root, loader={"read_ahead": read_ahead})
        training.train(path, "loop.steps=3")
        losses.append(training.losses(tmp_path / f"run{read_ahead}"))
    assert losses[0] == losses[1]
