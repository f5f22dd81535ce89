"""The command over Ray, without Ray: what it asks of a cluster. The loop is in test_dispatch.py."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import precompute
from sm_train.errors import UserError
from sm_train.models.speech import EncoderConfig
from sm_train.precompute import PrecomputeConfig
from tests import builders
from tests.training import free_port

CFG = PrecomputeConfig("m.parquet", "out", EncoderConfig(path="e"))


def test_actors_get_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e").mkdir()
    found = precompute._with_absolute_paths(CFG)
    assert (found.manifest, found.out) == (str(tmp_path / "m.parquet"), str(tmp_path / "out"))
    assert found.encoder.path == str(tmp_path / "e")
    hub = PrecomputeConfig("m", "s3://bucket/set", EncoderConfig(path="facebook/seamless-m4t-v2-large"))
    assert precompute._with_absolute_paths(hub).encoder == hub.encoder
    assert precompute._with_absolute_paths(hub).out == "s3://bucket/set"


class FakeRay:
    """Keeps what is asked of it."""

    exceptions = SimpleNamespace(
        RayActorError=OSError, WorkerCrashedError=OSError, NodeDiedError=OSError, OutOfMemoryError=OSError,
        ObjectLostError=OSError,
    )  # fmt: skip

    def __init__(self) -> None:
        self.own: dict[str, Any] = {}
        self.asked: dict[str, dict[str, Any]] = {}

    def init(self, **own: Any) -> None:
        self.own = own

    def remote(self, actor: type) -> Any:
        def options(**asked: Any) -> Any:
            self.asked[actor.__name__] = asked
            answer = SimpleNamespace(remote=object)
            return SimpleNamespace(remote=lambda *_: SimpleNamespace(ready=answer, load=answer))

        return SimpleNamespace(options=options)


@pytest.mark.parametrize(("decode_actors", "cpus"), [(0, 5), (3, 2)])
def test_its_own_ray_has_room_for_all_actors(decode_actors: int, cpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cfg = replace(CFG, actors=4, threads=2, decode_workers=3, decode_actors=decode_actors, decode_actor_cpus=6)
    ray = FakeRay()
    precompute._connect(ray, cfg)
    cfg = replace(cfg, actor_gpus=0.5)
    with pytest.raises(UserError, match=r"actor_gpus is 0.5, but there is no GPU here"):
        precompute._connect(ray, cfg)
    precompute._dispatch(ray, cfg, [])
    asked = ray.asked["EncodingActor"]
    assert (asked["num_cpus"], asked["num_gpus"], asked["max_task_retries"]) == (cpus, 0.5, 0)
    assert ray.asked["DecodeActor"]["num_cpus"] == 6
    assert ray.own["num_cpus"] == 4 * cpus + decode_actors * 6


def test_importing_it_does_not_import_ray() -> None:
    code = "import sys, cluster.precompute; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=builders.child_env(), check=False).returncode == 0


def test_a_cluster_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match=r"RAY_ADDRESS is '127.0.0.1:\d+', where no Ray answers"):
        precompute._connect(FakeRay(), CFG)
