"""Target sets of remote shard sets: built in a folder that stands for the set, then uploaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import fs

from sm_train.data import owner, remote_sets, shards
from sm_train.data.bucket import Bucket
from sm_train.errors import UserError
from tests import storage
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
    """What builds a target set in the house's way: whole ones are left alone."""
    root = folder / "targets/t"
    if shards.is_complete(root):
        return False
    names = [f"part-{number:07d}" for number in range(parts)]
    for name in names:
        shards.write_part(root, name, {"id": "str"}, [{"id": token}], [{"id": token}], [], {})
    shards.commit(root, names, {}, "tokens.parquet")
    return True


def test_a_folder_is_worked_on_in_place(local: Path) -> None:
    seen: list[Path] = []
    assert remote_sets.with_local_copy(str(local), "t", lambda folder: seen.append(folder) or build(folder))
    assert seen == [local]


def test_a_remote_set_gets_what_a_folder_gets_and_is_not_built_twice(
    local: Path, server: fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    Bucket(URI).write("targets/t/stranger", b"of a writer that was killed")
    assert remote_sets.with_local_copy(URI, "t", build)
    build(local)
    theirs = storage.objects(server, "bucket/set")
    mine = {p.relative_to(local).as_posix() for p in local.rglob("*") if p.is_file()}
    assert set(theirs) == mine
    assert all(Bucket(URI).read(name) == (local / name).read_bytes() for name in mine if name.startswith("targets"))
    monkeypatch.setattr(Bucket, "write", lambda *_: pytest.fail("nothing is written"))
    assert not remote_sets.with_local_copy(URI, "t", build)
    assert storage.objects(server, "bucket/set") == theirs


def test_one_that_is_killed_before_the_end_is_made_again(server: fs.S3FileSystem, local: Path) -> None:
    real = Bucket(URI)._remote.__class__.put

    def stop_before_the_end(self: object, name: str, data: object) -> None:
        if name == "targets/t/dataset.json":
            raise KeyboardInterrupt
        real(self, name, data)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sm_train.data.remote.Remote.put", stop_before_the_end)
        with pytest.raises(KeyboardInterrupt):
            remote_sets.with_local_copy(URI, "t", lambda folder: build(folder, "other", 2))
    assert "targets/t/part-0000001/_DONE.json" in storage.objects(server, "bucket/set")
    assert remote_sets.with_local_copy(URI, "t", build)
    assert "targets/t/part-0000001/_DONE.json" not in storage.objects(server, "bucket/set")
    build(local)
    assert Bucket(URI).read("targets/t/tokens.parquet") == (local / "targets/t/tokens.parquet").read_bytes()


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
    seen: list[bool] = []
    real = Bucket.publish
    dataset = "targets/t/dataset.json"
    monkeypatch.setattr(
        Bucket, "publish", lambda self, *args: (seen.append(self.exists(dataset)), real(self, *args))[1]
    )
    remote_sets.with_local_copy(URI, "t", lambda folder: ((folder / dataset).unlink(), build(folder, parts=2)))
    assert seen == [False]
    assert "targets/t/part-0000001/_DONE.json" in storage.objects(server, "bucket/set")


def test_a_driver_that_was_overtaken_uploads_nothing(server: fs.S3FileSystem) -> None:
    before = storage.objects(server, "bucket/set")

    def build_and_lose(folder: Path) -> None:
        build(folder)
        Bucket(URI).write(".owner/000009.json", b"{}")

    with pytest.raises(UserError, match="another driver has taken over"), owner.hold(Bucket(URI)) as held:
        remote_sets.with_local_copy(held, "t", build_and_lose)
    after = storage.objects(server, "bucket/set")
    assert {name for name in after if not name.startswith(".owner/")} == set(before)
