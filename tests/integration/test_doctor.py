"""The whole doctor as a person runs it, alone and under torchrun, with a real all-reduce."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest

from cluster.doctor import allreduce
from cluster.doctor.findings import FAIL, OK, Finding
from tests import training
from tests.builders import ROOT, run_module

pytestmark = pytest.mark.slow

CONFIG = str(ROOT / "configs/pretrain/miniature.yaml")


def words(folder: Path, root: Path) -> list[str]:
    """The miniature's config, on a shard set that is made in a second."""
    return [CONFIG, f"run={folder / 'run'}", f"shards={root}", f"target={training.TARGET}", "mapper.heads=2",
            f"mapper.widths=[{training.E},16,32]", "engine.device=cpu"]  # fmt: skip


def test_a_stage_that_can_begin_and_one_that_cannot(tmp_path: Path) -> None:
    root = training.shard_set(tmp_path / "set")
    done = run_module("cluster.doctor", "pretrain", *words(tmp_path, root), "ranks_per_node=2")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    names = {line[6:20].strip() for line in lines if re.match(r"(ok|warn|skip)  ", line)}
    assert names >= {"packages", "memory", "folder", "shards", "disk", "fit", "lanes", "trial", "all-reduce"}
    assert re.search(
        r"ok    all-reduce +2 ranks of this machine over gloo: [\d,]+ MB/s .* latency [\d,]+ us", done.stdout
    )
    assert re.fullmatch(r"\d+ lines in \d+ s: 0 failed, \d+ to look at", lines[-1])
    assert not (tmp_path / "run").exists()  # it only looks


def test_the_real_ranks_of_torchrun_and_a_failure(tmp_path: Path) -> None:
    root = training.shard_set(tmp_path / "set")
    (root / "part-0000000/_DONE.json").unlink()
    done = training.run_command(training.torchrun(2, "cluster.doctor", "pretrain", *words(tmp_path, root)))
    assert done.returncode == 1
    assert re.search(r"ok    all-reduce +2 ranks over gloo", done.stdout), done.stdout + done.stderr
    assert "ok    lanes         batch.lanes 2 over 2 ranks" in done.stdout  # as torchrun has them
    assert done.stdout.count("FAIL  ") == 1
    assert "1 of 1 parts are gone" in done.stdout
    assert done.stdout.count("ok    python") == 1  # rank 0 alone speaks


def test_what_another_node_warns_of_is_told_by_rank_0(tmp_path: Path) -> None:
    """Two ranks that each are the first of a node."""

    def work() -> None:
        rank, _ = allreduce.place()
        os.environ["LOCAL_RANK"] = "0"
        assert allreduce.meet() is None
        own = [Finding(FAIL, "shm", "0.1 GiB free", "--shm-size"), Finding(OK, "python", "3.11")] if rank else []
        told = list(allreduce.gathered(own))
        (tmp_path / str(rank)).write_text("\n".join(map(str, told)))

    assert training.in_ranks(2, work) == [0, 0]
    said = (tmp_path / "0").read_text().splitlines()
    assert said == [f"FAIL  shm           rank 1 on {socket.gethostname()}: 0.1 GiB free", "      --shm-size"]
