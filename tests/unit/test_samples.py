"""Verified reading: a subset of the random corruptions, and arrays read into place."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sm_train.data import shards
from sm_train.data.samples import FEATS, TOKENS, Samples
from sm_train.errors import UserError
from tests import training
from tests.chaos.test_corruption import COUNTS
from tests.corruption import run_all


def test_hundreds_of_random_corruptions_are_found(tmp_path: Path) -> None:
    counts = {kind: max(count // 25, 6) for kind, count in COUNTS.items() if "restart" not in kind}
    found = run_all(tmp_path, {**counts, "mirror, stale or damaged after a restart": 5}, seed=1)
    of_kind: Counter[str] = Counter()
    for (kind, outcome), count in found.items():
        of_kind[kind] += count
        assert outcome != "in bytes that nobody uses" or "bits" in kind
    assert of_kind == {**counts, "mirror, stale or damaged after a restart": 5}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return training.shard_set(tmp_path / "set", 10)


def test_an_array_is_read_into_its_place(root: Path) -> None:
    table = shards.read_table(root, "utterances.parquet")
    with Samples(root, table, FEATS) as samples:
        for row in range(10):
            whole = samples[row]["feats"]
            padded = np.full((len(whole) + 2, training.E), 7, np.float16)
            samples.read_into(row, "feats", padded[: len(whole)])
            assert np.array_equal(padded[: len(whole)], whole)
            assert (padded[len(whole) :] == 7).all()


def test_an_array_of_another_shape_or_type_is_refused_though_its_bytes_are_right(root: Path) -> None:
    with Samples(root, shards.read_table(root, "utterances.parquet"), FEATS) as samples:
        frames = len(samples[3]["feats"])
        for shape, dtype in (
            ((frames - 1, training.E), np.float16),
            ((frames + 1, training.E), np.float16),
            ((frames * training.E, 1), np.float16),
            ((frames * training.E,), np.float16),
            ((frames, training.E), np.int16),
        ):
            with pytest.raises(UserError, match=r"'utt-003' .*does not hold 'feats' as .* of shape"):
                samples.read_into(3, "feats", np.zeros(shape, dtype))


def test_a_shard_of_other_columns_is_corrupt(root: Path) -> None:
    with (
        Samples(root, shards.read_table(root, "utterances.parquet"), TOKENS) as samples,
        pytest.raises(UserError, match=r"its columns are \{'feats'.* expected were \{'id': 'str', 'tokens'"),
    ):
        samples[0]


def test_a_table_that_was_changed_is_refused(root: Path) -> None:
    path = root / "utterances.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + b"x" + whole[-8:])
    with pytest.raises(UserError, match=r"utterances\.parquet is missing or not the table that was committed"):
        shards.read_table(root, path.name)
    path.unlink()
    with pytest.raises(UserError, match="is missing or not the table"):
        shards.read_table(root, path.name)


def test_a_set_without_hashes_of_its_tables_says_how_to_get_them(root: Path) -> None:
    from sm_train import files

    dataset = files.read_json(root / shards.DATASET)
    del dataset["table_hashes"]
    files.write_json(root / shards.DATASET, dataset)
    with pytest.raises(UserError, match=r"has no table_hashes: an older version wrote it; remove .*dataset\.json"):
        shards.read_table(root, "utterances.parquet")
