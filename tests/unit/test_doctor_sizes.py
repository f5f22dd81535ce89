"""Bytes to write against the disk, and storages that answer or do not."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
from pyarrow import fs

from cluster.doctor import sizes
from cluster.doctor.findings import FAIL, OK, SKIP, WARN, carry_out
from cluster.doctor.work import Work
from cluster.submission import SCHEMAS, SubmitConfig
from sm_train import config
from tests import builders, training
from tests.builders import ROOT
from tests.storage import s3_server, upload


def work(stage: str, path: Path, *words: str) -> Work:
    return Work(stage, config.load(SCHEMAS[stage], [str(path), *words], "test"), SubmitConfig())


def precompute(folder: Path, manifest: Path, encoder: Path) -> Path:
    values = {"manifest": str(manifest), "out": str(folder / "set"), "encoder": {"path": str(encoder), "layer": 2}}
    (folder / "precompute.yaml").write_text(json.dumps(values))
    return folder / "precompute.yaml"


def test_features_take_as_many_bytes_as_foretold(
    shard_set: Path, manifest: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    asked = work("precompute", precompute(tmp_path, manifest, encoder_folder))
    size, _, why = sizes.to_write(asked)
    written = sum(path.stat().st_size for path in shard_set.glob("part-*/*.mds"))
    assert size == pytest.approx(written, rel=0.1)  # of 30 short utterances; 1% of the miniature's corpus
    assert "25 Hz x 32 x 2 bytes" in why
    assert sizes.disk(asked).mark == OK
    done = work("precompute", precompute(tmp_path, manifest, encoder_folder), f"out={shard_set}")
    assert sizes.to_write(done)[0] == 0


def test_a_corpus_too_large_for_any_disk(encoder_folder: Path, tmp_path: Path) -> None:
    rows = [builders.row(f"u{i}", "a.flac", 9e6, "the boat") for i in range(4000)]
    path = precompute(tmp_path, builders.write_manifest(tmp_path / "m.parquet", rows), encoder_folder)
    found = sizes.disk(work("precompute", path, "max_duration_s=1e7"))
    assert (found.mark, "10000000.0 h" in found.text) == (FAIL, True)
    unknown = sizes.disk(work("precompute", path, "encoder.path=no/such-encoder"))
    assert (unknown.mark, "is not known" in unknown.text) == (WARN, True)


def test_checkpoints_and_the_limit_of_a_file(tmp_path: Path) -> None:
    path = training.write_config(tmp_path / "run.yaml", tmp_path / "set", loop={"keep": 3})
    asked = work("pretrain", path)
    size, largest, why = sizes.to_write(asked)
    assert why.startswith("5 checkpoints")
    assert size > 1.5 * 5 * largest  # a checkpoint's weights are half of its moments
    for step in (100, 200):
        (Path(asked.out) / f"checkpoints/step-{step}").mkdir(parents=True)
        (Path(asked.out) / f"checkpoints/step-{step}/state.json").touch()
    resumed, _, why = sizes.to_write(asked)
    assert (size - resumed, "2 there already" in why) == (pytest.approx(2 * 1.5 * largest), True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(largest) - 1, hard))
        found = sizes.disk(asked)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (found.mark, "ulimit -f" in found.remedy) == (FAIL, True)
    assert sizes.disk(asked).mark == OK


def test_room() -> None:
    assert [sizes.room(size, 100.0, "").mark for size in (10.0, 90.0, 101.0)] == [OK, WARN, FAIL]


def test_a_cache_and_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (small,) = sizes.cache_folder(tmp_path / "cache", 0.001)
    (large,) = sizes.cache_folder(tmp_path / "cache", 1e9)
    assert (small.mark, large.mark, "cache_limit_gb" in large.remedy) == (OK, FAIL, True)
    (tmp_path / "cache/set").mkdir(parents=True)
    with (tmp_path / "cache/set/shard.mds").open("wb") as shard:
        shard.truncate(10**9)  # a sparse file: it takes no room
    (there,) = sizes.cache_folder(tmp_path / "cache", 1e9)
    assert (there.mark, "1.0 GB of it there" in there.text) == (FAIL, True)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1e9))
    assert [one.mark for limit in (1.9, 2.1) for one in sizes.cache_folder(tmp_path / "cache", limit)] == [OK, FAIL]
    monkeypatch.setattr(sizes, "kind_of", lambda path: "nfs4")
    assert [one.mark for one in sizes.cache_folder(tmp_path / "cache", 0.001)] == [WARN]


def test_room_for_the_copy_of_an_llm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, llm = ROOT / "configs/tune/llama31-8b.yaml", ROOT / "tools/miniature/weights/llm"
    words = [f"llm={llm}", f"llm_stage_to={tmp_path / 'local'}"]
    asked = work("tune", path, *words)
    assert "stage_to" in [check.name for check in sizes.checks(asked)]
    assert sizes.stage_folder(tmp_path, asked).mark in (OK, WARN)
    assert sizes.stage_folder(tmp_path, work("tune", path, "llm=no/such-llm", *words[1:])).mark == SKIP
    monkeypatch.setattr(sizes, "kind_of", lambda path: "nfs4")
    assert sizes.stage_folder(tmp_path, asked).mark == WARN
    assert sizes.stage_folder(Path("/proc"), asked).mark == FAIL  # no byte is free there


def test_a_storage_that_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = training.shard_set(tmp_path / "set", count=8)
    path = training.write_config(tmp_path / "run.yaml", root)
    remote = work("pretrain", path, "shards=s3://bucket/set", f"loader.cache={tmp_path}")
    with s3_server(monkeypatch) as storage:
        upload(storage, root, "bucket/set")
        assert [one.mark for check in sizes.checks(remote) if check.name == "storage" for one in carry_out(check)] == [
            OK
        ]
        assert sizes.readable("s3://bucket/set", "other").mark == FAIL
        assert sizes.writable("s3://bucket/new").mark == OK
        absent = sizes.checks(work("pretrain", path, "shards=s3://none/set", f"loader.cache={tmp_path}"))[-1]
        assert [one.mark for one in carry_out(absent)] == [FAIL]
        names = [info.path for info in storage.get_file_info(fs.FileSelector("bucket"))]
        assert names == ["bucket/set"]  # the probe is gone


def test_a_storage_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{training.free_port()}", "AWS_ACCESS_KEY_ID": "x",
                        "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1",
                        "AWS_EC2_METADATA_DISABLED": "true"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    path = training.write_config(tmp_path / "run.yaml", tmp_path)
    asked = work("pretrain", path, "shards=s3://bucket/set", f"loader.cache={tmp_path}")
    (found,) = carry_out(sizes.checks(asked)[-1])
    assert (found.mark, found.name) == (FAIL, "storage")
    assert "s3://bucket/set" in found.text
    assert sizes.disk(work("precompute", precompute(tmp_path, tmp_path, tmp_path), "out=s3://b/x")).mark == SKIP
