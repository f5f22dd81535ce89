"""One cache, several processes: the limit holds at every moment, every sample is right, a killed one is no matter."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from sm_train.data import shards
from sm_train.data.mirror import _locked, locate
from sm_train.data.remote import Remote
from sm_train.data.samples import FEATS, Samples
from tests import training
from tests.unit.test_mirror import PARTS, feature_set, shard_size

pytestmark = pytest.mark.slow
RANKS, IN_CACHE = 3, 4


def used(cache: Path) -> int:
    """Bytes of shards and of unfinished ones, while none can come or be evicted; a renamed file counts once."""
    sizes = {}
    with _locked(cache / ".lock"):
        for path in cache.glob("*/part-*/*"):
            try:
                found = path.stat()
            except FileNotFoundError:
                continue
            sizes[found.st_ino] = found.st_size
    return sum(sizes.values())


def read_at_random(remote: Path, cache: Path, limit: int, rank: int) -> None:
    root, mirror = locate(str(remote), "t", str(cache), limit / 1e9)
    samples = Samples(root, shards.read_table(root, "utterances.parquet"), FEATS, mirror)
    for row in np.random.default_rng(rank).integers(0, 4 * PARTS, 150).tolist():
        assert samples[row]["id"] == f"utt-{row // 4}{row % 4}"
        assert used(cache) <= limit


def test_ranks_share_a_cache_and_its_limit(tmp_path: Path) -> None:
    remote, cache = feature_set(tmp_path / "remote"), tmp_path / "cache"
    limit = IN_CACHE * shard_size(remote) + 10
    work = lambda: read_at_random(remote, cache, limit, int(os.environ["RANK"]))  # noqa: E731
    assert training.in_ranks(RANKS, work) == [0] * RANKS
    assert 0 < used(cache) <= limit
    assert not list(cache.rglob(".aside-*"))


def test_one_that_is_killed_at_a_transfer_leaves_nothing_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote, cache = feature_set(tmp_path / "remote"), tmp_path / "cache"
    limit = 2 * shard_size(remote) + 10
    real = Remote.download

    def die(self: Remote, name: str, path: Path, size: int) -> None:
        if name.startswith("part-0000003"):
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, name, path, size)

    with monkeypatch.context() as patch:
        patch.setattr(Remote, "download", die)
        assert training.in_ranks(1, lambda: read_at_random(remote, cache, limit, 0)) == [-signal.SIGKILL]
    assert list(cache.rglob(".aside-*"))
    assert training.in_ranks(1, lambda: read_at_random(remote, cache, limit, 0)) == [0]
    assert not list(cache.rglob(".aside-*"))
