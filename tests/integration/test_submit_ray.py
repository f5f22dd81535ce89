"""Jobs on a real Ray cluster that asks for a token: a head and three nodes beside it, of which each test loses one."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from sm_train.data.shards import SUBMITTED
from sm_train.precompute import PrecomputeConfig
from tests import training
from tests.integration.precompute_jobs import command_file, hashes, log_of, parts, poisoned, start, wait_until
from tests.ray_cluster import RayCluster, is_alive

pytestmark = pytest.mark.slow
STEPS, SAVE_EVERY = 200, 20
TRAINING = {
    "loop": {"steps": STEPS, "save_every": SAVE_EVERY, "log_every": SAVE_EVERY, "validate_every": 0},
    "engine": {"heartbeat_s": 2, "timeout_s": 60},
}
GONE_S = 30.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """Three nodes of two CPUs; encoding takes its time there."""
    made = RayCluster(tmp_path_factory.mktemp("ray"), nodes=3, cpus=2, **poisoned(TEST_SLOW_S="0.3"))
    yield made
    assert made.close() == []


def submit(cluster: RayCluster, stage: str, file: Path, *words: object, **env: str) -> subprocess.Popen[str]:
    """The command, which follows its job."""
    to = ("to=ray", f"ray.address={cluster.dashboard}", "ray.follow=true")
    return start("cluster.submit", stage, file, *to, *words, **{**cluster.auth, **env})


def require_gone(processes: list[psutil.Process]) -> None:
    """A raylet that was killed has taken everything with it that it had started."""
    wait_until(lambda: not any(is_alive(one) for one in processes), GONE_S)


def test_a_job_without_the_token_is_refused(cluster: RayCluster, tmp_path: Path) -> None:
    body = json.dumps({"entrypoint": f"touch {tmp_path}/done"}).encode()
    for own, status in (({}, 401), ({"Authorization": "Bearer guessed"}, 403)):
        request = urllib.request.Request(f"{cluster.dashboard}/api/jobs/", body, {"Content-Type": "application/json"})
        for name, value in own.items():
            request.add_header(name, value)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=30)
        assert refused.value.code == status
    file = training.write_config(tmp_path / "run.yaml", training.shard_set(tmp_path / "shards"))
    absent = {"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": "", "HOME": str(tmp_path)}
    for own, said in ((absent, "asks for a token, and none is here"), ({"RAY_AUTH_TOKEN": "guessed"}, "(403)")):
        command = submit(cluster, "pretrain", file, **own)
        _, err = command.communicate(timeout=120)
        assert command.returncode == 2, err
        assert err.startswith(f"error: the cluster at {cluster.dashboard}")
        assert said in err
        assert "RAY_AUTH_TOKEN_PATH" in err
    assert not (tmp_path / "done").exists()
    assert not (tmp_path / "run").exists()


def test_pretraining_loses_a_node_and_ends_with_the_same_bits(cluster: RayCluster, tmp_path: Path) -> None:
    shards = training.shard_set(tmp_path / "shards")
    file = training.write_config(tmp_path / "run.yaml", shards, **TRAINING)
    command = submit(cluster, "pretrain", file, "nodes=2")
    saved = tmp_path / "run/checkpoints/latest"
    wait_until(lambda: saved.is_symlink() or command.poll() is not None)
    killed = cluster.kill_holder("sm_train.pretrain")
    undisturbed = training.write_config(tmp_path / "undisturbed.yaml", shards, **TRAINING)
    assert training.in_ranks(2, lambda: training.train(undisturbed)) == [0, 0]
    out, err = command.communicate(timeout=240)
    assert command.returncode == 0, out + err
    require_gone(killed)
    ended = [training.tensors_of(run / "checkpoints/latest") for run in (tmp_path / "run", tmp_path / "undisturbed")]
    training.assert_equal(*ended)
    assert training.losses(tmp_path / "run") == training.losses(tmp_path / "undisturbed")
    attempts = [json.loads(path.read_text()) for path in sorted((tmp_path / "run/attempts").iterdir())]
    assert len(attempts) == 2
    assert SAVE_EVERY <= attempts[1]["from_step"] < STEPS
    assert "start 2 of the ranks" in out
    assert f"step {STEPS}/{STEPS}" in out
    assert sorted(os.listdir(tmp_path / f"run/{SUBMITTED}/0001/logs")) == ["rank-0.log", "rank-1.log"]


def test_a_mistake_ends_the_job_at_once(cluster: RayCluster, tmp_path: Path) -> None:
    file = training.write_config(tmp_path / "run.yaml", training.shard_set(tmp_path / "shards"), target="absent")
    command = submit(cluster, "pretrain", file, "ranks_per_node=2", "ray.cpus=1")
    out, err = command.communicate(timeout=120)
    assert command.returncode == 2, out + err
    assert out.count("error: ") == 1
    assert "start 2" not in out


def test_precompute_loses_a_node_and_ends_with_the_same_bytes(
    cfg: PrecomputeConfig, reference: dict[str, str], cluster: RayCluster, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    command = submit(cluster, "precompute", command_file(replace(cfg, actors=2, out=str(out)), tmp_path))
    wait_until(lambda: parts(out) >= 2 or command.poll() is not None)
    killed = cluster.kill_holder("EncodingActor")
    printed, err = command.communicate(timeout=240)
    assert command.returncode == 0, printed + err
    require_gone(killed)
    found = {name: digest for name, digest in hashes(out).items() if not name.startswith(SUBMITTED)}
    assert found == reference
    assert log_of(out, "end")[0]["deaths"] == 1
