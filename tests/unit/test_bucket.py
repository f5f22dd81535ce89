"""Sets in a bucket: whole or absent, put if absent, what fails and how it is said."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from sm_train.data import processes, s3, store
from sm_train.data.bucket import Bucket
from sm_train.errors import UserError
from tests import storage

MARKER = "_DONE.json"


@pytest.fixture(scope="module")
def moto() -> Iterator[fs.S3FileSystem]:
    with pytest.MonkeyPatch.context() as patch, storage.s3_server(patch) as server:
        yield server


@pytest.fixture
def bucket(
    moto: fs.S3FileSystem, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Bucket:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr("sm_train.data.remote._PAUSE_S", 0.001)
    return Bucket(f"s3://bucket/{request.node.name.partition('[')[0]}/set/")


def names_of(bucket: Bucket, server: fs.S3FileSystem) -> list[str]:
    return sorted(storage.objects(server, bucket.uri.removeprefix("s3://")))


def folder_of(bucket: Bucket, name: str, files: dict[str, bytes]) -> Path:
    aside = bucket.scratch(name)
    for file, data in files.items():
        (aside / file).parent.mkdir(parents=True, exist_ok=True)
        (aside / file).write_bytes(data)
    return aside


def test_an_address_opens_a_bucket_and_a_path_a_folder(bucket: Bucket, tmp_path: Path) -> None:
    assert isinstance(store.at("s3://bucket/x"), Bucket)
    assert isinstance(store.at(str(tmp_path)), store.Folder)
    assert store.at(bucket) is bucket
    assert bucket.uri.endswith("/set")
    assert store.absolute("s3://b/x") == "s3://b/x"
    assert store.absolute("x") == str(Path("x").resolve())
    with pytest.raises(UserError, match="hdfx://x: sets are written to a folder, to s3"):
        store.at("hdfx://x")
    with pytest.raises(UserError, match=r"file:///a/b: a set in a folder is named by its path, as /a/b$"):
        store.at("file:///a/b")
    with pytest.raises(UserError, match="settings of a storage come from the environment"):
        store.at("s3://bucket/x?region=a")


def test_files_are_written_read_listed_and_removed_without_a_trace(bucket: Bucket, moto: fs.S3FileSystem) -> None:
    assert bucket.names() == []
    assert not bucket.exists("a")
    with pytest.raises(store.Absent, match=r"set/a does not exist"):
        bucket.read("a")
    bucket.write("a", b"1")
    bucket.write("a", b"22")
    bucket.write("empty", b"")
    for name in ("part-0000001/x", "part-0000000/x", ".owner/1", ".owner/.aside-2"):
        bucket.write(name, b"x")
    assert bucket.read("a") == b"22"
    assert bucket.read("empty") == b""
    assert bucket.names() == ["a", "empty", "part-0000000", "part-0000001"]
    assert bucket.names(".owner") == ["1"]
    assert bucket.exists("part-0000000")
    assert bucket.exists("part-0000000/x")
    assert not bucket.exists("part-000000")
    for name in ("a", "empty", "part-0000000", "absent", ".owner/1"):
        bucket.remove(name)
    assert names_of(bucket, moto) == [".owner/.aside-2", "part-0000001/x"]


def test_a_part_is_uploaded_with_its_marker_last_and_a_whole_one_stays(
    bucket: Bucket, moto: fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    real = bucket._remote.put

    def put(name: str, data: Any) -> None:
        order.append(name)
        real(name, data)

    monkeypatch.setattr(bucket._remote, "put", put)
    files = {"shard.00000.mds": os.urandom(25 << 20), "index.json": b"{}", "sub/empty": b"", MARKER: b"done"}
    bucket.write("p/stranger", b"of a writer that was killed")
    order.clear()
    aside = folder_of(bucket, "p", files)
    bucket.publish(aside, "p", MARKER)
    assert (order[-1], len(order)) == (f"p/{MARKER}", 4)
    assert not aside.exists()
    assert names_of(bucket, moto) == sorted(f"p/{name}" for name in files)
    assert all(bucket.read(f"p/{name}") == data for name, data in files.items())
    bucket.publish(folder_of(bucket, "p", {**files, "index.json": b"other"}), "p", MARKER)
    assert bucket.read("p/index.json") == b"{}"
    removed: list[str] = []
    monkeypatch.setattr(bucket, "_delete", lambda name: removed.append(name))
    bucket.remove("p", MARKER)
    assert (removed[0], len(removed)) == (f"p/{MARKER}", 4)


def test_of_many_writers_at_once_one_wins(bucket: Bucket) -> None:
    others = [Bucket(bucket.uri) for _ in range(4)]
    barrier, wins = threading.Barrier(4), [0] * 25

    def write(number: int) -> None:
        for round, _ in enumerate(wins):
            barrier.wait()
            if others[number].write_new(f"lease-{round}", b"%d" % number):
                wins[round] += 1

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wins == [1] * 25


def test_a_put_if_absent_whose_answer_was_lost_is_still_ones_own(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, first in (("mine", "cut_down"), ("late", "503")):
        faults = iter([first])
        with storage.bad_connection(monkeypatch, lambda method, _, faults=faults: next(faults, "")):
            assert bucket.write_new(name, b"1")
        assert not bucket.write_new(name, b"1")


def test_without_a_conditional_put_the_later_of_two_wins(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, data: bytes) -> bool:
        raise s3.NotSupported

    def write_just_before_another(name: str, data: bytes) -> None:
        other.write(name, data)
        other.write(name, b"theirs")

    other = Bucket(bucket.uri)
    monkeypatch.setattr(s3, "put_new", refuse)
    monkeypatch.setattr("sm_train.data.bucket._SETTLE_S", 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(bucket, "write", write_just_before_another)
        assert not bucket.write_new("a", b"mine")
    assert bucket.write_new("b", b"mine")
    assert not bucket.write_new("b", b"theirs")


def test_an_upload_of_which_only_a_piece_is_there_is_done_again(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, times = bucket._remote._files, iter([True, True])

    class Cutting:
        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

        def open_output_stream(self, path: str) -> Any:
            out = inner.open_output_stream(path)
            if not next(times, False):
                return out

            class Cut:
                def write(self, data: Any) -> None:
                    out.write(data[: len(data) // 2])

                def close(self) -> None:
                    out.close()

            return Cut()

    monkeypatch.setattr(bucket._remote, "_files", Cutting())
    bucket.write("a", b"12345678")
    assert bucket.read("a") == b"12345678"
    monkeypatch.setattr("sm_train.data.remote._ATTEMPTS", 1)
    times = iter([True])
    with pytest.raises(UserError, match=r"set/a cannot be written, 1 attempts failed: 4 bytes of 8 are there; run"):
        bucket.write("a", b"12345678")


def test_what_processes_that_are_gone_left_is_swept(bucket: Bucket) -> None:
    pid, start, machine = processes.own().split("-")
    mine = folder_of(bucket, "p", {"x": b"1"})
    dead, foreign = (mine.with_name(f"{pid}-{s}-{m}-p") for s, m in ((f"{start}0", machine), (start, "0" * 12)))
    for path in (dead, foreign):
        path.mkdir()
    bucket.sweep()
    assert [mine.exists(), dead.exists(), foreign.exists()] == [True, False, True]
    dead.mkdir()
    assert not bucket.scratch("p").exists()
    assert [mine.exists(), dead.exists()] == [False, False]


def test_mistakes_and_failures_are_one_line(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Bucket("s3://nobucket/x")
    for call in (lambda: absent.write("a", b"1"), lambda: absent.write_new("a", b"1")):
        with pytest.raises(UserError, match=r"s3://nobucket/x/a: the bucket does not exist; make it, or mend"):
            call()
    with (
        storage.bad_connection(monkeypatch, lambda *_: "503"),
        pytest.raises(UserError, match=r"set/a cannot be written, 4 attempts failed: .*(SLOW_DOWN|slow)") as error,
    ):
        bucket.write_new("a", b"1")
    assert "\n" not in str(error.value)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    s3._client.cache_clear()
    with pytest.raises(UserError, match="there are no credentials; set AWS_ACCESS_KEY_ID"):
        bucket.write_new("a", b"1")
    s3._client.cache_clear()


def test_a_storage_that_is_not_there_or_never_answers_is_given_up_in_time(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sm_train.data.remote._SILENT_S", 1.0)
    monkeypatch.setattr("sm_train.data.remote._PATIENCE_S", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        mute = Bucket("s3://bucket/x")
        with pytest.raises(UserError, match=r"s3://bucket/x/a cannot be fetched, \d attempts failed: .*NETWORK_CONN"):
            mute.read("a")
    with pytest.raises(UserError, match=r"s3://bucket/x/a cannot be fetched, \d attempts failed: .*NETWORK_CONN"):
        mute.read("a")  # nobody listens any more
