from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sm_train.data import mds, mds_writer, shards
from sm_train.data.samples import FEATS, Samples
from tests import builders
from tests.mosaic import streaming as mosaic

COLUMNS = {"id": "str", "feats": "ndarray:float16"}


def samples(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [{"id": f"ü{i}", "feats": rng.normal(size=(1 + i % 5, 7)).astype(np.float16)} for i in range(count)]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small shards instead of one of 64 MiB."""
    monkeypatch.setattr(mds_writer, "SHARD_BYTES", 600)


def write(folder: Path, columns: dict[str, str], written: list[dict[str, Any]]) -> list[mds.SampleRef]:
    return mds_writer.write(folder, columns, written)[0]


@pytest.mark.parametrize("shard_bytes", [600, 1 << 26])
def test_the_files_are_those_of_mosaics_own_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int
) -> None:
    monkeypatch.setattr(mds_writer, "SHARD_BYTES", shard_bytes)
    refs, digests = mds_writer.write(tmp_path / "ours", COLUMNS, samples(40))
    with mosaic.MDSWriter(out=str(tmp_path / "theirs"), columns=COLUMNS, size_limit=shard_bytes) as theirs:
        for i, sample in enumerate(samples(40)):
            theirs.write(sample)
            assert refs[i].xxh3 == mds.digest(theirs.encode_sample(sample))
    names = sorted(os.listdir(tmp_path / "theirs"))
    assert names == sorted(os.listdir(tmp_path / "ours")) == sorted(digests)
    assert len(names) == (2 if shard_bytes > 600 else 8)
    for name in names:
        ours = (tmp_path / "ours" / name).read_bytes()
        assert ours == (tmp_path / "theirs" / name).read_bytes()
        assert digests[name] == mds.digest(ours)


def test_arrays_of_any_order_and_thousands_of_pieces_are_written(tmp_path: Path) -> None:
    many = [{"id": f"{i}", "feats": np.full((2, 3), i % 50, np.float16).T} for i in range(3000)]
    refs = write(tmp_path / "p", COLUMNS, many)
    with mds.Shard(tmp_path / "p" / refs[0].shard) as shard:
        for i in (0, 1023, 2999):
            np.testing.assert_array_equal(shard.decode(shard.read(i))["feats"], many[i]["feats"])


@pytest.mark.parametrize("array", [np.zeros((2, 2), np.float32), np.zeros((0, 2), np.float16)])
def test_what_is_no_array_of_the_column_is_refused(tmp_path: Path, array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="column 'feats' holds float"):
        write(tmp_path / "p", COLUMNS, [{"id": "a", "feats": array}])


def test_our_reader_gives_what_mosaics_own_reader_gives(tmp_path: Path, small_shards: None) -> None:
    written = samples(30)
    refs = write(tmp_path / "part", COLUMNS, written)
    theirs = mosaic.LocalDataset(str(tmp_path / "part"))
    assert len(theirs) == len(refs) == 30
    assert len({ref.shard for ref in refs}) > 3
    for i, ref in enumerate(refs):
        with mds.Shard(tmp_path / "part" / ref.shard) as shard:
            data = shard.read(ref.index)
            ours = shard.decode(data)
        assert mds.digest(data) == ref.xxh3
        for found in (ours, theirs[i]):
            assert found["id"] == written[i]["id"]
            assert found["feats"].dtype == np.float16
            np.testing.assert_array_equal(found["feats"], written[i]["feats"])


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("float16", (3, 2)), ("float32", (300, 2)), ("int32", (70_000,)), ("int32", (1, 2, 3, 4)), ("uint16", (5, 3))],
)
def test_every_kind_of_array_comes_back(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    (ref,) = write(tmp_path / "p", {"x": f"ndarray:{dtype}"}, [{"x": array}])
    with mds.Shard(tmp_path / "p" / ref.shard) as shard:
        found = shard.decode(shard.read(0))["x"]
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_the_same_samples_give_the_same_bytes_and_none_give_an_empty_index(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, COLUMNS, samples(5))
    for file in os.listdir(tmp_path / "a"):
        assert mds.file_digest(tmp_path / "a" / file) == mds.file_digest(tmp_path / "b" / file)
    assert write(tmp_path / "empty", COLUMNS, []) == []
    assert json.loads((tmp_path / "empty" / "index.json").read_text())["shards"] == []


def test_a_write_that_the_disk_changed_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.writev
    monkeypatch.setattr(os, "writev", lambda handle, views: real(handle, [bytes(sum(map(len, views)))]))
    with pytest.raises(RuntimeError, match="differs from what was written"):
        write(tmp_path / "p", COLUMNS, samples(2))


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda b: b"",
    "cut in the count": lambda b: b[:3],
    "cut in the table": lambda b: b[:20],
    "cut at the end": lambda b: b[:-1],
    "a count of 4 billion": lambda b: struct.pack("<I", 2**32 - 1) + b[4:],
    "an offset beyond the end": lambda b: b[:8] + struct.pack("<I", 2**31) + b[12:],
    "a pickled column": lambda b: b.replace(b'"str"', b'"pkl"'),
    "an array of a type that is not read": lambda b: b.replace(b":float16", b":float64"),
    "a column key too few": lambda b: b.replace(b"column_names", b"column_nemas"),
    "no JSON": lambda b: b.replace(b'"column_names"', b"\"column_names'"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_shard_is_refused_at_once(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    (ref, *_) = write(tmp_path / "p", COLUMNS, samples(3))
    path = tmp_path / "p" / ref.shard
    path.write_bytes(damage(path.read_bytes()))
    handles = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="is not a whole MDS shard"):
        mds.Shard(path)
    assert len(os.listdir("/proc/self/fd")) == handles


ARRAYS = {
    "nothing": b"",
    "a shape that is cut": bytes([2 << 2 | 3, 1]),
    "63 dimensions": b"\xff" + bytes(63 * 8),
    "more than there is": bytes([1 << 2 | 3]) + struct.pack("<Q", 2**62) + bytes(8),
    "a length below zero": bytes([1 << 2 | 3]) + struct.pack("<Q", 2**64 - 1) + bytes(8),
    "half a number": bytes([1 << 2, 1, 0]),
}


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_bytes_that_are_no_sample_are_a_value_error(tmp_path: Path, array: bytes) -> None:
    (ref,) = write(tmp_path / "p", COLUMNS, samples(1))
    with mds.Shard(tmp_path / "p" / ref.shard) as shard:
        for data in (b"", b"abc", struct.pack("<2I", len(array), 1) + array + b"i", struct.pack("<2I", 2**32 - 1, 9)):
            with pytest.raises(ValueError, match="bytes"):
                shard.decode(data)


READER = """
import json, sys, types
sys.modules["streaming.vision"] = types.ModuleType("streaming.vision")
from streaming import LocalDataset
found = [[s["id"], s["feats"].shape, float(s["feats"].astype("f8").sum())] for s in LocalDataset(sys.argv[1])]
assert not [name for name in sys.modules if name.startswith("sm_train")]
print(json.dumps(found))
"""


def test_a_mosaicml_reader_without_our_code_reads_a_whole_set(shard_set: Path, tmp_path: Path) -> None:
    env = {name: value for name, value in builders.child_env().items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", READER, str(shard_set)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    table = shards.read_table(shard_set, "utterances.parquet")
    with Samples(shard_set, table, FEATS) as ours:
        found = [ours[row] for row in range(len(ours))]
    assert len(found) == 30
    assert json.loads(done.stdout) == [
        [s["id"], list(s["feats"].shape), float(s["feats"].astype("f8").sum())] for s in found
    ]
