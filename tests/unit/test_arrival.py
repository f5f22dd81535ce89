"""Files that come after their markers, as a shared file system may show them; and those that never come."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sm_train import files
from sm_train.data import arrival, shards
from sm_train.data.samples import FEATS, Samples
from sm_train.data.target_set import EMBEDDING, TargetSet
from sm_train.errors import UserError
from sm_train.train import checkpoint
from tests.unit.test_checkpoint import made

NEVER = 600.0


@contextmanager
def late(path: Path, cut: int | None = None, after_s: float = 0.3) -> Iterator[None]:
    """A file that is absent, or has so many bytes, and becomes what it was while the body runs, or at its end."""
    data = path.read_bytes()
    files.write_whole(path, lambda aside: aside.write_bytes(data[:cut])) if cut else path.unlink()

    over = threading.Event()

    def come() -> None:
        over.wait(after_s)
        files.write_whole(path, lambda aside: aside.write_bytes(data))

    thread = threading.Thread(target=come)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrival, "PATIENCE_S", 60.0)


def never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrival, "PATIENCE_S", 0.1)


def features(root: Path) -> None:
    table = shards.read_table(root, "utterances.parquet")
    with Samples(root, table, FEATS) as samples:
        assert samples[0]["id"] == table.column("id")[0].as_py()


READERS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a table": ("utterances.parquet", features, "is missing or not the table that was committed"),
    "a shard": ("part-0000000/shard.00000.mds", features, "are not those that were committed"),
    "an embedding": (f"targets/tiny/{EMBEDDING}", lambda root: TargetSet(root, "tiny"), "is not what was committed"),
}


@pytest.mark.parametrize("cut", [None, 3, 100])
@pytest.mark.parametrize("what", READERS)
def test_what_comes_late_is_waited_for_and_what_never_comes_is_named(
    shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, cut: int | None
) -> None:
    name, read, error = READERS[what]
    root = tmp_path / "set"
    shutil.copytree(shard_set, root)
    with late(root / name, cut):
        read(root)
    never(monkeypatch)
    with late(root / name, cut, after_s=NEVER), pytest.raises(UserError, match=error):
        read(root)


def test_the_index_of_a_part_is_waited_for(shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "set"
    shutil.copytree(shard_set, root)
    parts, before = shards.parts_of(root), (root / "index.json").read_bytes()
    with late(root / parts[1] / "index.json"):
        shards.commit(root, parts, {}, "utterances.parquet")
    assert (root / "index.json").read_bytes() == before
    never(monkeypatch)
    with (
        late(root / parts[1] / "index.json", after_s=NEVER),
        pytest.raises(UserError, match=r"index\.json does not exist"),
    ):
        shards.commit(root, parts, {}, "utterances.parquet")


@pytest.mark.parametrize("name", [checkpoint.STATE, checkpoint.WEIGHTS, checkpoint.MOMENTS])
def test_a_checkpoint_that_latest_and_best_point_at_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run = tmp_path / "run"
    for step in (2, 4):
        checkpoint.save(run, 0, made(step), {}, is_best=step == 4, keep=2)
    folder = run / "checkpoints/step-4"
    with late(folder / name):
        assert checkpoint.load(folder.parent / "latest").global_step == 4
    with late(folder / checkpoint.WEIGHTS):
        assert checkpoint.find(run) == folder
    with late(folder / checkpoint.WEIGHTS):
        assert checkpoint.find(folder.parent / "best") == folder.parent / "best"
    never(monkeypatch)
    with (
        late(folder / name, after_s=NEVER),
        pytest.raises(UserError, match=r"is damaged .* go on from another: ln -sfn"),
    ):
        checkpoint.load(folder)


def test_a_long_wait_says_what_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(arrival, "_SAY_S", 0.1)
    path = tmp_path / "index.json"
    path.write_text("{}")
    with late(path, after_s=0.6):
        assert arrival.wait_for(path)
    assert capsys.readouterr().err == (
        f"waiting for {path}: its marker is there, the file is not yet, or not all of it\n"
    )


def test_what_is_as_long_as_it_should_be_is_not_waited_for(
    shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaged or not, and nor is what cannot be read at all."""
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits"))
    root = tmp_path / "set"
    shutil.copytree(shard_set, root)
    for name in ("utterances.parquet", "part-0000000/shard.00000.mds", f"targets/tiny/{EMBEDDING}", "index.json"):
        assert arrival.wait_for(root / name)
        data = bytearray((root / name).read_bytes())
        data[len(data) // 2] ^= 1
        (root / name).write_bytes(data)
        assert arrival.wait_for(root / name)
    (tmp_path / "header.safetensors").write_bytes(b"\x02" + bytes(7) + b"[]")
    assert arrival.wait_for(tmp_path / "header.safetensors")
    assert arrival.wait_for(tmp_path)  # a folder is no file, and none comes
