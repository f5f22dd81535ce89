"""The config of precompute, and its runs without a model; those with one are in tests/integration."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from sm_train import precompute
from sm_train.data import owner, shards, store
from sm_train.errors import UserError
from sm_train.models.speech import EncoderConfig
from sm_train.precompute import PrecomputeConfig, run
from sm_train.records import Receipt, Unit
from tests.chaos import sets

CFG = PrecomputeConfig("m.parquet", "sets/mine", EncoderConfig(path="e"))


@pytest.mark.parametrize(
    ("log", "out", "file"),
    [
        ("auto", "sets/mine", Path("sets/mine/log.jsonl")),
        ("auto", "s3://bucket/mine", None),
        ("none", "sets/mine", None),
        ("logs/x.jsonl", "s3://bucket/mine", Path("logs/x.jsonl")),
    ],
)
def test_measurements_lie_in_a_local_sets_folder_unless_asked_otherwise(log: str, out: str, file: Path | None) -> None:
    assert precompute._log_file(replace(CFG, log=log, out=out)) == file


@pytest.mark.parametrize("name", ["unit_utterances", "batch_s", "threads", "actors", "decode_workers"])
def test_what_must_be_above_zero_is(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0"):
        replace(CFG, **{name: 0})


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_s", float("nan")), ("max_duration_s", 0), ("max_quarantined_share", 5), ("silence_dbfs", float("nan"))],
)
def test_numbers_that_mean_nothing_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is "):
        replace(CFG, **{name: value})


def test_a_part_that_is_lost_after_its_audio_was_mended_becomes_the_same_bytes(tmp_path: Path) -> None:
    """And nobody is committed twice: whom a round took up stays quarantined in the part that had them before."""
    root = tmp_path / "set"
    run(sets.job(tmp_path, root), sets.spread)
    run(sets.job(tmp_path, root, requeue=True), sets.spread)
    before = sets.contents(root)
    ids = shards.read_table(root, "utterances.parquet").column("id").to_pylist()
    assert sorted(ids) == [f"utt-{i:02}" for i in range(24)]
    store.at(root).remove("part-0000000", shards.DONE)
    (root / shards.DATASET).unlink()
    run(sets.job(tmp_path, root), partial(sets.spread, mended=True))
    assert sets.contents(root) == before


def test_an_utterance_in_two_parts_is_refused_and_the_set_stays(tmp_path: Path) -> None:
    root = tmp_path / "set"
    run(sets.job(tmp_path, root), sets.spread)
    before = sets.contents(root)
    names = shards.parts_of(root)
    place = store.at(root)
    for file in (shards.DONE, "index.json"):
        place.write(f"part-0000009/{file}", place.read(f"{names[0]}/{file}"))
    with pytest.raises(UserError, match="is in part-0000000 and in part-0000009; remove one"):
        shards.commit(root, [*names, "part-0000009"], {}, "utterances.parquet")
    assert sets.contents(root).items() >= before.items()


def test_who_finishes_an_interrupted_round_holds_the_lease(tmp_path: Path) -> None:
    root = tmp_path / "set"
    run(sets.job(tmp_path, root), sets.spread)

    def interrupted(cfg: PrecomputeConfig, units: Sequence[Unit]) -> Generator[Receipt, None, None]:
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        run(sets.job(tmp_path, root, requeue=True), interrupted)
    held = []

    def watched(cfg: PrecomputeConfig, units: Sequence[Unit]) -> Generator[Receipt, None, None]:
        held.append(owner.is_left(root))
        yield from sets.spread(cfg, units, mended=True)

    run(sets.job(tmp_path, root), watched)
    assert held == [True]
    assert shards.read_table(root, shards.QUARANTINE).num_rows == 0
    run(sets.job(tmp_path, root), lambda cfg, units: pytest.fail("no part needs encoding"))
