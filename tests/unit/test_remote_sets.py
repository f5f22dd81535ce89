"""Target sets of remote shard sets: built in a folder that stands for the set, then uploaded."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from pyarrow import fs

from sm_train.data import owner, remote_sets, shards
from sm_train.data.bucket import Bucket
from sm_train.data.remote import Remote
from sm_train.errors import UserError
from sm_train.models import targets
from sm_train.models.targets import TargetConfig
from tests import storage
from tests.growing import grow
from tests.unit.test_mirror import feature_set

URI = "s3://bucket/set"


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A shard set without its target set, in a folder and at :data:`URI`."""
    root = feature_set(tmp_path / "local")
    shutil.rmtree(root / "targets")
    return root


@pytest.fixture
def server(local: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fs.S3FileSystem]:
    with storage.s3_server(monkeypatch) as made:
        storage.upload(made, local, "bucket/set")
        yield made


def build(folder: Path, token: str = "a", parts: int = 1) -> bool:
    """What builds a target set in the house's way: what is whole is left alone."""
    root = folder / "targets/t"
    if shards.is_complete(root):
        return False
    shards.open_set(root, {})
    names = [f"part-{number:07d}" for number in range(parts)]
    for name in names:
        if not shards.is_committed(root, name):
            row = {"id": f"{token}{name}"}
            shards.write_part(root, name, {"id": "str"}, [row], [row], [], {})
    shards.commit(root, names, {}, "tokens.parquet")
    return True


@contextmanager
def dies_at(name: str) -> Iterator[None]:
    """An upload that ends before a file of this name."""
    real = Remote.put

    def put(self: Remote, there: str, data: bytes | Path) -> None:
        if there.endswith(name):
            raise KeyboardInterrupt
        real(self, there, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Remote, "put", put)
        with pytest.raises(KeyboardInterrupt):
            yield


def files_of(root: Path) -> dict[str, str]:
    paths = [path for path in root.rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_a_folder_is_worked_on_in_place(local: Path) -> None:
    seen: list[Path] = []
    assert remote_sets.with_local_copy(str(local), "t", lambda folder: seen.append(folder) or build(folder))
    assert seen == [local]


def test_a_remote_set_gets_what_a_folder_gets_and_is_not_built_twice(
    local: Path, server: fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert remote_sets.with_local_copy(URI, "t", build)
    build(local)
    assert storage.objects(server, "bucket/set") == files_of(local)
    monkeypatch.setattr(Bucket, "write", lambda *_: pytest.fail("nothing is written"))
    assert not remote_sets.with_local_copy(URI, "t", build)
    assert storage.objects(server, "bucket/set") == files_of(local)


def test_one_that_is_killed_is_gone_on_with(server: fs.S3FileSystem, local: Path) -> None:
    for name in ("tokens.parquet", "part-0000000/_DONE.json", "t/dataset.json"):
        with dies_at(name):
            remote_sets.with_local_copy(URI, "t", lambda folder: build(folder, parts=2))
        there = storage.objects(server, "bucket/set")
        assert "targets/t/contract.json" in there
        assert "targets/t/dataset.json" not in there
        assert all(f"{done.rpartition('/')[0]}/index.json" in there for done in there if done.endswith("_DONE.json"))
    assert remote_sets.with_local_copy(URI, "t", lambda folder: build(folder, "another token", parts=2))
    build(local, parts=2)
    assert storage.objects(server, "bucket/set") == files_of(local)


def test_what_is_no_target_set_is_let_be_and_named_by_its_address(server: fs.S3FileSystem) -> None:
    Bucket(URI).write("targets/t/stranger", b"")
    with pytest.raises(UserError, match=f"^folder {URI}/targets/t is not empty and holds no shard set"):
        remote_sets.with_local_copy(URI, "t", build)
    assert "targets/t/stranger" in storage.objects(server, "bucket/set")


def test_a_set_with_tasks_that_is_killed_as_it_grows_becomes_what_a_folder_becomes(
    shard_set: Path, llm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "PART_UTTERANCES", 8)
    cfg, local = TargetConfig("t", str(llm_folder)), tmp_path / "grows"
    shutil.copytree(shard_set, local, ignore=shutil.ignore_patterns("targets"))
    targets.build(cfg, local)
    (local / "targets/t/tasks.parquet").write_bytes(b"hours of work")
    with storage.s3_server(monkeypatch) as server:
        storage.upload(server, local, "bucket/set")
        grow(local, ["the old boat runs", "two stones two birds"], [60, 60])
        storage.upload(server, local, "bucket/set")
        targets.build(cfg, local)
        for name in ("t/contract.json", "part-0000004/shard.00000.mds", "part-0000004/_DONE.json", "t/dataset.json"):
            with dies_at(name):
                remote_sets.with_local_copy(URI, "t", partial(targets.make, cfg))
            there = storage.objects(server, "bucket/set")
            assert {"targets/t/tasks.parquet", "targets/t/part-0000003/_DONE.json"} <= there.keys()
            assert "targets/t/dataset.json" not in there
        remote_sets.with_local_copy(URI, "t", partial(targets.make, cfg))
        assert storage.objects(server, "bucket/set") == files_of(local)


def test_what_build_removes_is_removed(server: fs.S3FileSystem, local: Path) -> None:
    remote_sets.with_local_copy(URI, "t", lambda folder: build(folder, parts=2))

    def anew(folder: Path) -> None:
        shutil.rmtree(folder / "targets/t")
        build(folder, "b")

    remote_sets.with_local_copy(URI, "t", anew)
    build(local, "b")
    assert storage.objects(server, "bucket/set") == files_of(local)


def test_files_that_join_a_complete_target_set_are_uploaded_alone(
    server: fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote_sets.with_local_copy(URI, "t", build)
    before = storage.objects(server, "bucket/set")
    written: list[str] = []
    real = Bucket.write
    monkeypatch.setattr(Bucket, "write", lambda self, name, data: (written.append(name), real(self, name, data))[1])
    remote_sets.with_local_copy(URI, "t", lambda folder: (folder / "targets/t/tasks.parquet").write_bytes(b"tasks"))
    after = storage.objects(server, "bucket/set")
    assert written == ["targets/t/tasks.parquet"]
    assert set(after) - set(before) == {"targets/t/tasks.parquet"}
    assert before.items() <= after.items()


def test_one_that_grows_is_openly_incomplete_meanwhile(
    server: fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote_sets.with_local_copy(URI, "t", build)
    seen: dict[str, bool] = {}
    real = Bucket.write
    dataset = "targets/t/dataset.json"

    def write(self: Bucket, name: str, data: bytes | Path) -> None:
        seen[name.removeprefix("targets/t/")] = self.exists(dataset)
        real(self, name, data)

    monkeypatch.setattr(Bucket, "write", write)
    remote_sets.with_local_copy(URI, "t", lambda folder: ((folder / dataset).unlink(), build(folder, parts=2)))
    assert not any(seen.values())
    assert list(seen)[-2:] == ["part-0000001/_DONE.json", "dataset.json"]
    assert not any(name.startswith("part-0000000") for name in seen)


def test_a_driver_that_was_overtaken_uploads_nothing(server: fs.S3FileSystem) -> None:
    before = storage.objects(server, "bucket/set")

    def build_and_lose(folder: Path) -> None:
        build(folder)
        Bucket(URI).write(".owner/000009.json", b"{}")

    with pytest.raises(UserError, match="another driver has taken over"), owner.hold(Bucket(URI)) as held:
        remote_sets.with_local_copy(held, "t", build_and_lose)
    after = storage.objects(server, "bucket/set")
    assert {name for name in after if not name.startswith(".owner/")} == set(before)
