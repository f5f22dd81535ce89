"""Remote sets: what is fetched when, the limit, stale and corrupt copies, storages that fail."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sm_train.data import mds, shards
from sm_train.data import mirror as mirror_module
from sm_train.data.batches import SpeechItems
from sm_train.data.mirror import locate
from sm_train.data.samples import FEATS, Samples
from sm_train.data.target_set import TargetSet
from sm_train.errors import UserError
from tests import storage, training

PARTS = 6


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sm_train.data.remote._PAUSE_S", 0.001)
    monkeypatch.setattr("sm_train.data.mirror._PAUSE_S", 0.001)


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    """A set with the parts 0 to 5, of 4 utterances each, on a path that stands for a slow storage."""
    return feature_set(tmp_path / "remote")


def feature_set(root: Path, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    names = [f"part-{number:07d}" for number in range(PARTS)]
    for number, name in enumerate(names):
        ids = [f"utt-{number}{i}" for i in range(4)]
        samples = [{"id": i, "feats": rng.normal(size=(9, 8)).astype(np.float16)} for i in ids]
        shards.write_part(root, name, FEATS, samples, [{"id": i, "num_frames": 9} for i in ids], [], {})
    shards.commit(root, names, {"layer": 1}, "utterances.parquet")
    target = root / "targets/t"
    shards.write_part(target, "part-0000000", {"id": "str"}, [{"id": "a"}], [{"id": "a"}], [], {})
    shards.commit(target, ["part-0000000"], {}, "tokens.parquet")
    return root


def shard_size(root: Path) -> int:
    return next(root.glob("part-*/*.mds")).stat().st_size


def opened(remote: Path | str, cache: Path, shards_in_cache: float = 100) -> Samples:
    size = 1000 if "://" in str(remote) else shard_size(Path(remote))
    root, mirror = locate(str(remote), "t", str(cache), shards_in_cache * size / 1e9)
    assert mirror is not None
    return Samples(root, shards.read_table(root, "utterances.parquet"), FEATS, mirror)


def cached(cache: Path) -> list[str]:
    return sorted(path.parent.name[-1] for path in cache.glob("*/part-*/*.mds"))


def assert_whole(samples: Samples, remote: Path) -> None:
    with Samples(remote, shards.read_table(remote, "utterances.parquet"), FEATS) as theirs:
        for row in range(len(theirs)):
            assert samples[row]["id"] == theirs[row]["id"]
            assert samples[row]["feats"].tobytes() == theirs[row]["feats"].tobytes()


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


def test_small_files_come_at_once_and_shards_when_they_are_read(remote: Path, tmp_path: Path) -> None:
    samples = opened(remote, tmp_path / "cache")
    have = {path.relative_to(samples.root).as_posix() for path in samples.root.rglob("*") if path.is_file()}
    assert {"dataset.json", "utterances.parquet", "quarantine.parquet", "index.json", "targets/t/dataset.json",
            "targets/t/tokens.parquet", "targets/t/part-0000000/shard.00000.mds"} <= have  # fmt: skip
    assert cached(tmp_path / "cache") == []
    samples[9]
    assert cached(tmp_path / "cache") == ["2"]
    assert_whole(samples, remote)
    assert not list((tmp_path / "cache").rglob(".aside-*"))


def test_without_a_cache_a_path_is_itself_and_an_address_an_error(remote: Path) -> None:
    assert locate(str(remote), "t", None, 1) == (remote, None)
    with pytest.raises(UserError, match=r"shards is 's3://b/x', a remote set; set loader.cache"):
        locate("s3://b/x", "t", None, 1)
    with pytest.raises(UserError, match=r"hdfx://b/x cannot be opened"):
        locate("hdfx://b/x", "t", "/tmp", 1)


def test_a_set_that_is_not_whole_is_an_error_that_names_the_file(remote: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"targets/other/dataset\.json does not exist"):
        locate(str(remote), "other", str(tmp_path / "cache"), 1)
    shutil.rmtree(remote / "part-0000003")
    with pytest.raises(UserError, match=r"part-0000003/shard\.00000\.mds does not exist"):
        opened(remote, tmp_path / "cache")[12]


def test_the_limit_holds_and_what_was_used_last_stays(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, seen = tmp_path / "cache", []
    real = mirror_module.Remote.download

    def watch(self: Any, name: str, path: Path, size: int) -> None:
        seen.append(sum(p.stat().st_size for p in cache.glob("*/part-*/*")))  # asides count from their first byte
        real(self, name, path, size)

    monkeypatch.setattr(mirror_module.Remote, "download", watch)
    samples = opened(remote, cache, 3)
    for part in (0, 1, 2, 0, 3):
        samples[4 * part]
    assert cached(cache) == ["0", "2", "3"]
    for part in np.random.default_rng(0).integers(0, PARTS, 60):
        assert samples[4 * int(part)]["id"] == f"utt-{part}0"
    assert max(seen) <= 3 * shard_size(remote)
    assert len(cached(cache)) == 3


def test_two_sets_share_a_limit_and_an_open_shard_stays(remote: Path, tmp_path: Path) -> None:
    other = feature_set(tmp_path / "other", seed=1)
    first, second = opened(remote, tmp_path / "cache", 2), opened(other, tmp_path / "cache", 2)
    first[0]
    for row in (0, 4, 8, 12):
        second[row]
    assert sorted(len(list(root.glob("part-*/*.mds"))) for root in (first.root, second.root)) == [1, 1]
    assert first[1]["id"] == "utt-01"
    assert (first.root / "part-0000000/shard.00000.mds").exists()


def test_a_full_cache_names_limit_and_need(remote: Path, tmp_path: Path) -> None:
    first, second = opened(remote, tmp_path / "cache", 1), opened(remote, tmp_path / "cache", 1)
    assert first.mirror is not None
    handle = first.mirror.open("part-0000000/shard.00000.mds", lambda: None)  # as another process holds it
    with pytest.raises(UserError, match=r"is full: .*part-0000001/shard.00000.mds needs .* GB, loader.cache_limit_gb"):
        second[4]
    os.close(handle)
    assert second[4]["id"] == "utt-10"
    assert first[0]["id"] == "utt-00"  # the process's own readers make way for each other
    assert second[8]["id"] == "utt-20"
    with pytest.raises(UserError, match="is full"):
        opened(remote, tmp_path / "small", 0.5)[0]
    assert cached(tmp_path / "small") == []


def test_what_a_killed_process_left_aside_is_removed_and_what_lives_is_waited_for(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = opened(remote, tmp_path / "cache", 2)
    dead = samples.root / "part-0000004/.aside-shard.00000.mds"
    dead.parent.mkdir()
    dead.write_bytes(b"x" * shard_size(remote))
    alive = samples.root / "part-0000000/.aside-shard.00000.mds"
    alive.parent.mkdir()
    alive.write_bytes((remote / "part-0000000/shard.00000.mds").read_bytes())
    handle = os.open(alive, os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX)
    real, waited = fcntl.flock, []

    def other_finishes(descriptor: int, how: int) -> None:
        if how == fcntl.LOCK_SH and alive.exists():
            waited.append(os.path.exists(dead))
            os.replace(alive, alive.with_name("shard.00000.mds"))
            os.close(handle)
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", other_finishes)
    assert samples[0]["id"] == "utt-00"
    assert waited == [False]


def test_a_corrupt_copy_is_fetched_again_once_and_a_corrupt_original_is_an_error(remote: Path, tmp_path: Path) -> None:
    samples = opened(remote, tmp_path / "cache")
    samples[0], samples[4]
    samples.close()
    again = opened(remote, tmp_path / "cache")  # after a restart
    damage(again.root / "part-0000001/shard.00000.mds")
    assert_whole(again, remote)
    damage(remote / "part-0000002/shard.00000.mds")  # in its last sample
    again.mirror.discard("part-0000002/shard.00000.mds")  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"part-0000002/shard\.00000\.mds, fetched to .*utterance 'utt-23' are not"):
        again[11]


@pytest.mark.parametrize("name", ["utterances.parquet", "targets/t/tokens.parquet", ".mirror.json",
                                  "targets/t/part-0000000/shard.00000.mds", "dataset.json"])  # fmt: skip
def test_a_damaged_small_file_is_fetched_again_at_the_next_start(remote: Path, tmp_path: Path, name: str) -> None:
    root = opened(remote, tmp_path / "cache").root
    damage(root / name)
    samples = opened(remote, tmp_path / "cache")
    if name != ".mirror.json":
        assert (root / name).read_bytes() == (remote / name).read_bytes()
    assert_whole(samples, remote)


def test_a_set_that_has_changed_is_mirrored_anew(remote: Path, tmp_path: Path) -> None:
    samples = opened(remote, tmp_path / "cache")
    assert_whole(samples, remote)
    (samples.root / "targets/t/stranger").write_text("of the old set")
    shutil.rmtree(remote)
    feature_set(remote, seed=5)
    again = opened(remote, tmp_path / "cache")
    assert cached(tmp_path / "cache") == []
    assert not (again.root / "targets/t/stranger").exists()
    assert_whole(again, remote)


def test_tasks_that_were_written_later_are_fetched(remote: Path, tmp_path: Path) -> None:
    tasks = remote / "targets/t/tasks.parquet"
    tasks.write_bytes(b"one")
    root = opened(remote, tmp_path / "cache").root
    tasks.write_bytes(b"two")
    os.utime(tasks, ns=(1, 1))
    opened(remote, tmp_path / "cache")
    assert (root / "targets/t/tasks.parquet").read_bytes() == b"two"


def test_a_name_that_leaves_the_folder_is_refused(remote: Path, tmp_path: Path) -> None:
    mirror = opened(remote, tmp_path / "cache").mirror
    assert mirror is not None
    for name in ("../x", "/etc/passwd", "part-0000000/../../x"):
        with pytest.raises(UserError, match="leaves the set's folder"):
            mirror.open(name, lambda: None)


class Cut:
    """A file that gives too little, or fails, for some reads."""

    def __init__(self, inner: Any, bad: itertools.count[int], last_bad: int) -> None:
        self.inner, self.bad, self.last_bad = inner, bad, last_bad

    def __enter__(self) -> Cut:
        return self

    def __exit__(self, *error: object) -> None:
        self.inner.close()

    def size(self) -> int:
        return int(self.inner.size())

    def read_at(self, count: int, begin: int) -> bytes:
        number = next(self.bad)
        if number <= self.last_bad:
            if number % 2:
                raise OSError("connection reset by peer")
            return bytes(self.inner.read_at(count, begin))[: count // 2]
        return bytes(self.inner.read_at(count, begin))


@pytest.mark.parametrize("failures", [1, 2, 3, 4])
def test_transfers_that_break_are_tried_again_and_then_are_one_error(
    remote: Path, tmp_path: Path, failures: int
) -> None:
    samples, calls = opened(remote, tmp_path / "cache"), itertools.count(1)
    mirror = samples.mirror
    assert mirror is not None
    inner = mirror._remote._files

    class Flaky:
        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

        def open_input_file(self, path: str) -> Cut:
            return Cut(inner.open_input_file(path), calls, failures)

    mirror._remote._files = Flaky()  # type: ignore[assignment]
    if failures < 4:
        assert samples[0]["id"] == "utt-00"
    else:
        with pytest.raises(UserError, match=r"shard.00000.mds cannot be fetched, 4 attempts failed: .* bytes came"):
            samples[0]
        assert not list(samples.root.glob("part-*/*"))


def test_a_set_on_s3_gives_the_samples_of_the_local_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sm_train.data.remote._RANGE", 1 << 10)  # several ranges a shard
    local = training.shard_set(tmp_path / "local", count=30)
    theirs = SpeechItems(local, TargetSet(local, training.TARGET), ["train"])
    with storage.s3_server(monkeypatch) as bucket:
        storage.upload(bucket, local, "bucket/sets/one")
        root, mirror = locate("s3://bucket/sets/one/", training.TARGET, str(tmp_path / "cache"), 1.0)
        ours = SpeechItems(root, TargetSet(root, training.TARGET), ["train"], mirror)
        assert ours.ids == theirs.ids
        assert ours.shard_of is not None
        assert ours.shard_of.tolist() == [0] * len(ours)
        assert theirs.shard_of is None
        for one, other in zip(ours.collate(np.arange(9)), theirs.collate(np.arange(9)), strict=True):
            assert np.array_equal(np.asarray(one), np.asarray(other))
        name = "part-0000000/shard.00000.mds"
        ours.feats.close()
        damage(root / name)
        ours.collate(np.arange(26))
        assert mds.file_digest(root / name) == mds.file_digest(local / name)
        path = training.write_config(tmp_path / "run.yaml", Path("x"), loader={"cache": str(tmp_path / "cache2")})
        training.train(path, "shards=s3://bucket/sets/one", "loop.steps=5")
        assert len(training.metrics(tmp_path / "run")) == 5
        with pytest.raises(UserError, match=r"s3://bucket/sets/two/dataset\.json does not exist"):
            locate("s3://bucket/sets/two", training.TARGET, str(tmp_path / "cache"), 1.0)


def test_the_record_knows_where_a_mirror_comes_from(remote: Path, tmp_path: Path) -> None:
    samples = opened(remote, tmp_path / "cache")
    assert json.loads((samples.root / ".mirror.json").read_text())["uri"] == str(remote)
