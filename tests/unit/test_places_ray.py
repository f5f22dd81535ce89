"""Submission to Ray: the requests, what is refused before one is sent, and the manifests for Kubernetes."""

from __future__ import annotations

import itertools
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import ray_train
from cluster.places import ray as to_ray
from cluster.places import ray_api
from sm_train import config
from sm_train.errors import UserError
from sm_train.precompute import PrecomputeConfig
from tests.builders import ROOT
from tests.submitting import job, project, require_golden

__all__ = ["project"]

pytestmark = pytest.mark.usefixtures("project")
PRETRAIN = ("pretrain", "configs/pretrain/llama31-8b.yaml", "to=ray")
PRECOMPUTE = ("precompute", "configs/precompute/librispeech.yaml", "to=ray")
EVALUATE = ("evaluate", "configs/evaluate/llama31-8b.yaml", "to=ray")
MANIFESTS = ROOT / "cluster/ray"


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ray-precompute.yaml", PRECOMPUTE),
        ("ray-retarget.yaml", ("retarget", "data/shards", "--llm", "some/llm", "--name", "a name", "to=ray")),
        ("ray-pretrain.yaml", (*PRETRAIN, "nodes=2", "ranks_per_node=8", "gpus_per_node=8", "ray.max_restarts=3")),
        ("ray-evaluate.yaml", (*EVALUATE, "gpus_per_node=1", "ray.address=https://ray.example:8265/")),
    ],
)
def test_the_request_is_as_shown(name: str, words: tuple[str, ...], project: Path) -> None:
    require_golden(name, to_ray.script(job(*words)).replace(str(project), "PROJECT"))


def test_the_line_for_a_shell_sends_the_same(project: Path) -> None:
    asked = job("retarget", "data/shards", "--llm", "it's", "--name", "a name", "to=ray")
    line, _, body = to_ray.script(asked).partition("\n")
    sent = yaml.safe_load(body)
    assert sent == to_ray.request(asked)
    words = shlex.split(line.removeprefix("# "))
    end = words.index("--")
    assert shlex.join(words[end + 1 :]) == sent["entrypoint"]  # as ray job submit puts them together
    given = dict(itertools.pairwise(words[:end]))
    assert yaml.safe_load(given["--runtime-env-json"]) == sent["runtime_env"]
    assert given["--submission-id"] == sent["submission_id"]
    assert given["--entrypoint-num-cpus"] == "1"


def test_the_entrypoint_of_training_is_read_as_it_was_meant(project: Path) -> None:
    asked = job(*PRETRAIN, "nodes=2", "ranks_per_node=4", "gpus_per_node=4", "ray.cpus=3", "ray.stop_s=7")
    words = shlex.split(to_ray.request(asked)["entrypoint"])
    assert words[:6] == ["env", "-C", "/shared/project", "python", "-m", "cluster.ray_train"]
    own = [word for word in words[7:] if "=" in word]
    read = config.from_words(ray_train.RanksConfig, own, "test")
    assert (read.nodes, read.ranks_per_node, read.gpus_per_node, read.stop_s) == (2, 4, 4, 7)
    assert read.of_node(threads=1) == {"CPU": 12, "GPU": 4}
    assert Path(words[7]).parent == Path(read.folder)


def test_a_job_s_name_is_its_folder_s_alone(project: Path) -> None:
    first, other = (to_ray.request(job(*PRETRAIN, f"run=runs/{name}"))["submission_id"] for name in "ab")
    assert first == to_ray.request(job(*PRETRAIN, "run=runs/a"))["submission_id"]
    assert first.startswith("pretrain-a-0001-")
    assert first != other


def test_where_the_cluster_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert to_ray.address(job(*PRETRAIN)) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://other:8265/")
    assert to_ray.address(job(*PRETRAIN)) == "http://other:8265"
    assert to_ray.address(job(*PRETRAIN, "ray.address=https://here")) == "https://here"


NODE = {"CPU": 16.0, "GPU": 8.0}


@pytest.mark.parametrize(
    ("words", "nodes", "said"),
    [
        ((*PRETRAIN, "nodes=2", "ranks_per_node=8", "gpus_per_node=8"), [NODE, NODE], None),
        ((*PRETRAIN, "nodes=2", "ranks_per_node=8", "gpus_per_node=8"), [NODE, {"CPU": 16.0}],
         "needs 2 nodes with 16 CPUs and 8 GPUs each, and the cluster at .* has room for 1: 16 CPUs and 0 GPUs;"),
        ((*PRETRAIN, "nodes=2", "ranks_per_node=4", "gpus_per_node=4"), [NODE], "has room for 1: 16 CPUs and 8 GPUs"),
        ((*PRETRAIN, "ranks_per_node=8", "gpus_per_node=8", "ray.cpus=4"), [NODE], "needs 1 nodes with 32 CPUs and 8"),
        ((*PRETRAIN, "nodes=3", "ray.grows=true"), [NODE], None),
        ((*PRECOMPUTE, "actors=2", "actor_gpus=1", "threads=4", "decode_workers=4"), [NODE], None),
        ((*PRECOMPUTE, "actors=3", "actor_gpus=1", "threads=4", "decode_workers=4"), [NODE, {"CPU": 32.0}],
         "needs 3 places with 8 CPUs and 1 GPUs each, .* room for 2"),
        ((*PRECOMPUTE, "actors=2", "actor_gpus=1", "threads=4", "decode_actors=3", "decode_actor_cpus=4"), [NODE],
         "needs 3 places with 4 CPUs and 0 GPUs each, .* room for 2"),
        ((*EVALUATE, "gpus_per_node=1"), [{"CPU": 16.0}], "needs 1 places with 1 CPUs and 1 GPUs each"),
    ],
)  # fmt: skip
def test_more_than_the_cluster_has_is_refused(
    words: tuple[str, ...], nodes: list[dict[str, float]], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_api, "nodes", lambda address: nodes)
    if said is None:
        to_ray.check(job(*words))
    else:
        with pytest.raises(UserError, match=said):
            to_ray.check(job(*words))


def test_what_needs_no_cluster_to_be_refused() -> None:
    with pytest.raises(UserError, match="actor by actor: set actors and actor_gpus, not nodes"):
        to_ray.check(job(*PRECOMPUTE, "nodes=2"))
    with pytest.raises(UserError, match=r"ray\.stop_s is 0\.0; it must be at least 1"):
        job(*PRETRAIN, "ray.stop_s=0")
    to_ray.check(job(*PRETRAIN, "dry_run=true"))  # asks nobody


@pytest.mark.parametrize("path", sorted(MANIFESTS.glob("*.yaml")), ids=lambda path: path.name)
def test_a_manifest_holds_together(path: Path) -> None:
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    assert (found["apiVersion"], found["kind"]) == ("ray.io/v1", "RayJob")
    spec, cluster = found["spec"], found["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    pinned = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line.startswith("ray==")]
    assert pinned == [f"ray=={cluster['rayVersion']}"]
    env = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    words = shlex.split(spec["entrypoint"])
    assert words[:5] == ["env", "-C", env["PYTHONPATH"], "python", "-m"]
    (group,) = cluster["workerGroupSpecs"]
    of_pod = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    has = [{"CPU": float(of_pod["cpu"]), "GPU": float(of_pod["nvidia.com/gpu"])}] * group["replicas"]
    if words[5] == "cluster.ray_train":
        asked, cfg, _ = ray_train.read(words[6:])
        wanted = [(asked.nodes, asked.of_node(cfg.engine.threads), True)]
        assert cfg.batch.lanes % (asked.nodes * asked.ranks_per_node) == 0
    else:
        assert words[5] == "cluster.precompute"
        config.load(PrecomputeConfig, words[6:], "test")
        wanted = to_ray.needs(job("precompute", *words[6:], "to=ray"))
    to_ray.require_room(wanted, has, "the manifest's cluster")


def test_env_has_the_option_that_an_entrypoint_begins_with(tmp_path: Path) -> None:
    ran = subprocess.run(["env", "-C", str(tmp_path), "pwd"], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == str(tmp_path)
