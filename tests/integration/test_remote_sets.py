"""Sets on a storage with S3's interface: the bytes of a local run, through a bad connection, kills and rivals too."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
from pyarrow import fs

from sm_train import precompute
from sm_train.data import owner
from sm_train.data.batches import SpeechItems
from sm_train.data.mirror import locate
from sm_train.data.target_set import TargetSet
from sm_train.errors import UserError, run_command
from sm_train.precompute import PrecomputeConfig, in_this_process, run
from sm_train.records import Receipt, Unit
from tests import storage
from tests.integration.precompute_jobs import command_file, hashes, wait_until

pytestmark = pytest.mark.slow

OUT = "s3://bucket/sets/one"


@pytest.fixture(scope="module")
def small(cfg: PrecomputeConfig) -> PrecomputeConfig:
    """Five parts of six utterances."""
    return replace(cfg, unit_utterances=6)


@pytest.fixture(scope="module")
def local(small: PrecomputeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run into a folder makes of it."""
    folder = tmp_path_factory.mktemp("local") / "set"
    run(replace(small, out=str(folder)), in_this_process)
    return folder


@pytest.fixture
def server(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fs.S3FileSystem]:
    """A storage that holds the corpus."""
    with storage.s3_server(monkeypatch) as made:
        storage.upload(made, manifest.parent, "bucket/corpus")
        yield made


def remote(cfg: PrecomputeConfig) -> PrecomputeConfig:
    """The same job from and to a storage."""
    return replace(cfg, manifest="s3://bucket/corpus/manifest.parquet", out=OUT)


def found(server: fs.S3FileSystem) -> dict[str, str]:
    return storage.objects(server, OUT.removeprefix("s3://"))


def driver(argv: list[str], said: Path, go: Path | None = None) -> BaseProcess:
    """The command in a process of its own, forked from one that has imported what takes long; and never touched S3.

    Args:
        said: the file of what it prints.
        go: it waits for this file after its first part.
    """
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([__name__, "transformers.models.seamless_m4t_v2.modeling_seamless_m4t_v2"])
    process = forks.Process(target=_drive, args=(argv, dict(os.environ), said, go))
    process.start()
    return process


def _drive(argv: list[str], env: dict[str, str], said: Path, go: Path | None) -> None:
    os.environ.update(env)
    handle = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.argv, owner.BEAT_S, real = ["precompute", *argv], 0.5, precompute.in_this_process

    def wait(cfg: PrecomputeConfig, units: Sequence[Unit]) -> Iterator[Receipt]:
        for receipt in real(cfg, units):
            while go and not go.exists():
                time.sleep(0.01)
            yield receipt

    precompute.in_this_process = wait
    run_command(precompute.main)


def test_a_remote_set_is_the_local_one_and_trains_alike(
    small: PrecomputeConfig, local: Path, server: fs.S3FileSystem, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(remote(small), in_this_process)
    assert found(server) == hashes(local)
    capsys.readouterr()
    run(remote(small), lambda cfg, units: pytest.fail("no part needs encoding"))
    assert capsys.readouterr().out == f"{OUT}: complete, 30 utterances\n{OUT}/targets/tiny: complete, 30 utterances\n"
    root, mirror = locate(OUT, "tiny", str(tmp_path / "cache"), 1.0)
    ours = SpeechItems(root, TargetSet(root, "tiny"), ["train", "dev"], mirror)
    theirs = SpeechItems(local, TargetSet(local, "tiny"), ["train", "dev"])
    assert ours.ids == theirs.ids
    assert len(ours) == 30
    for one, other in zip(ours.collate(np.arange(30)), theirs.collate(np.arange(30)), strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))


def test_shares_of_a_remote_set_are_encoded_beside_each_other(
    small: PrecomputeConfig, local: Path, server: fs.S3FileSystem, tmp_path: Path
) -> None:
    file = command_file(remote(small), tmp_path)
    shares = [driver([str(file), f"share={i}/2"], tmp_path / f"said-{i}") for i in range(2)]
    for process in shares:
        process.join(120)
    said = [(tmp_path / f"said-{i}").read_text() for i in range(2)]
    assert [process.exitcode for process in shares] == [0, 0], said
    assert sum(f"all 5 are there; now: python -m sm_train.precompute {file}\n" in one for one in said) >= 1
    run(remote(small), lambda cfg, units: pytest.fail("no part needs encoding"))
    assert found(server) == hashes(local)


def test_an_object_that_is_absent_is_quarantined_and_a_bucket_that_is_stops_the_job(
    small: PrecomputeConfig, server: fs.S3FileSystem
) -> None:
    server.delete_file("bucket/corpus/audio/004.flac")
    with pytest.raises(
        UserError, match=r"1 of 30 utterances are quarantined \(1 missing_audio\).*'utt-004': s3://buck"
    ):
        run(remote(small), in_this_process)
    with pytest.raises(
        UserError, match=r"^s3://nobucket/x\S+: the bucket does not exist; make it, or mend the address"
    ):
        run(replace(small, out="s3://nobucket/x"), in_this_process)


def test_a_bad_connection_changes_no_byte(
    small: PrecomputeConfig, local: Path, server: fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, count = storage.at_random(seed=1, share=0.08)
    with storage.bad_connection(monkeypatch, plan):
        said = ""
        try:
            run(remote(small), in_this_process)
        except UserError as error:
            said = str(error)
    assert not said or ("attempts failed" in said and "\n" not in said)
    assert said or found(server) == hashes(local)
    assert sum(count[fault] for fault in storage.FAULTS) > 5
    run(remote(small), in_this_process)  # nothing is left to do, unless it gave up
    assert found(server) == hashes(local)


def test_a_storage_that_goes_away_is_one_line_and_the_same_command_goes_on(
    small: PrecomputeConfig, local: Path, server: fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sm_train.data.remote._PAUSE_S", 0.01)
    monkeypatch.setattr("sm_train.data.remote._REQUESTS", 1)
    gone = threading.Event()

    def plan(method: str, path: str) -> str:
        if method == "PUT" and "part-0000002" in path:
            gone.set()
        return "503" if gone.is_set() else ""

    with (
        storage.bad_connection(monkeypatch, plan),
        pytest.raises(UserError, match=rf"{OUT}/\S+ cannot be \w+, 4 attempts failed: ") as error,
    ):
        run(remote(small), in_this_process)
    assert "\n" not in str(error.value)
    assert "dataset.json" not in found(server)
    run(remote(small), in_this_process)
    assert found(server) == hashes(local)


def test_a_kill_in_the_middle_of_an_upload_changes_no_byte(
    small: PrecomputeConfig, local: Path, server: fs.S3FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (at_it, never), file = (threading.Event(), threading.Event()), command_file(remote(small), tmp_path)

    def plan(method: str, path: str) -> str:
        if method == "PUT" and path.endswith(target):
            at_it.set()
            never.wait(60)
            return "cut_up"
        return ""

    for target in ("part-0000001/shard.00000.mds", "targets/tiny/embedding.safetensors"):
        at_it.clear()
        never.clear()
        with storage.bad_connection(monkeypatch, plan):
            command = driver([str(file)], tmp_path / "said")
            wait_until(lambda: at_it.is_set() or command.exitcode is not None)  # noqa: B023
            command.kill()
            command.join()
            never.set()
        assert at_it.is_set(), (tmp_path / "said").read_text()
        assert not any(name.endswith(f"{Path(target).parent}/_DONE.json") for name in found(server))
        assert ("dataset.json" in found(server)) == target.startswith("targets")
    run(remote(small), in_this_process)
    assert found(server) == hashes(local)


def test_of_two_drivers_one_does_the_work_and_the_other_says_so(
    small: PrecomputeConfig, local: Path, server: fs.S3FileSystem, tmp_path: Path
) -> None:
    go, file = tmp_path / "go", command_file(remote(small), tmp_path)
    outs = [OUT, str(tmp_path / "set")]
    pairs = [
        [driver([str(file), f"out={out}"], tmp_path / f"said-{i}-{j}", go) for j in range(2)]
        for i, out in enumerate(outs)
    ]
    wait_until(lambda: all(any(one.exitcode is not None for one in pair) for pair in pairs))
    for i, (out, pair) in enumerate(zip(outs, pairs, strict=True)):
        (lost,) = (j for j, one in enumerate(pair) if one.exitcode is not None)
        line = (tmp_path / f"said-{i}-{lost}").read_text()
        assert pair[lost].exitcode == 2
        assert line.startswith(f"error: {out}: another driver is at work there (host ")
        assert f"pid {pair[1 - lost].pid}, since " in line
        assert line.count("\n") == 1
    go.touch()
    for pair in pairs:
        for one in pair:
            one.join(120)
        assert sorted(one.exitcode or 0 for one in pair) == [0, 2]
    assert found(server) == hashes(tmp_path / "set") == hashes(local)


def test_hashes_see_every_file(local: Path) -> None:
    assert {"dataset.json", "targets/tiny/dataset.json", "part-0000004/_DONE.json"} <= set(hashes(local))
    assert hashlib.sha256((local / "index.json").read_bytes()).hexdigest() == hashes(local)["index.json"]
