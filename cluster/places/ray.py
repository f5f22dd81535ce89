"""Submission to a Ray cluster: what ``ray job submit`` sends, with the code, without data.

The cluster is reached over the HTTP of its dashboard. Its token is found as Ray finds it: RAY_AUTH_TOKEN, the file that
RAY_AUTH_TOKEN_PATH names, ~/.ray/auth_token.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shlex
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from cluster.places import ray_api
from cluster.ray_train import RanksConfig
from cluster.stages import TRAINING, module
from sm_train import config, files
from sm_train.errors import STOPPED, UserError

if TYPE_CHECKING:
    from cluster.submission import Job

DASHBOARD = "http://127.0.0.1:8265"
_STOP_MARGIN_S = 30  # beyond what ranks have to save in


@dataclass(frozen=True)
class RayConfig:
    """What a Ray cluster is asked."""

    address: str = config.key("", f"of its dashboard; default: RAY_API_SERVER_ADDRESS, else {DASHBOARD}")
    cpus: int = config.key(0, "CPUs for a rank, or an evaluation; 0: its threads and one more for a rank, one else")
    max_restarts: int = config.key(10, "pretrain, tune: starts of all ranks after the first, when some are lost")
    stop_s: float = config.key(120.0, "pretrain, tune: seconds that ranks have to save in, when the job is stopped")
    grows: bool = config.key(False, "the cluster has an autoscaler: wait for places that it does not have now")
    follow: bool = config.key(False, "print what the job prints, and end with its code")

    def __post_init__(self) -> None:
        for name, least in (("cpus", 0), ("max_restarts", -1), ("stop_s", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(f"ray.{name} is {getattr(self, name)}; it must be at least {least}")


def request(job: Job) -> dict[str, Any]:
    """What the cluster's job server is sent: the arguments of JobSubmissionClient.submit_job."""
    asked, words = job.submit, [module(job.stage), *job.args]
    env = dict(job.env)  # Ray puts the shipped code before its PYTHONPATH
    reserved: dict[str, Any] = {}
    if job.stage in TRAINING:
        words = ["cluster.ray_train", job.stage, *job.args, *(f"{name}={value}" for name, value in _ranks(job).items())]
        env["RAY_JOB_STOP_WAIT_TIME_S"] = str(round(asked.ray.stop_s) + _STOP_MARGIN_S)
    elif job.stage != "precompute":  # whose actors reserve what they need
        reserved = {"entrypoint_num_cpus": asked.ray.cpus or 1, "entrypoint_num_gpus": asked.gpus_per_node}
    place = hashlib.sha256(str(job.there(job.folder)).encode()).hexdigest()[:8]
    return {
        "submission_id": f"{job.name}-{job.folder.name}-{place}",
        "entrypoint": shlex.join(["env", "-C", str(job.home), asked.python or "python", "-m", *words]),
        "runtime_env": {"working_dir": str(job.folder / "code"), "excludes": ["__pycache__"], "env_vars": env},
        "metadata": {"stage": job.stage, "folder": str(job.there(job.folder))},
        **reserved,
    }


def _ranks(job: Job) -> dict[str, Any]:
    """The words of cluster.ray_train."""
    asked = job.submit
    words = {"nodes": asked.nodes, "ranks_per_node": asked.ranks_per_node, "gpus_per_node": asked.gpus_per_node}
    own = {"cpus_per_rank": asked.ray.cpus, "max_restarts": asked.ray.max_restarts, "stop_s": asked.ray.stop_s}
    return {**words, **own, "folder": job.there(job.folder)}


def address(job: Job) -> str:
    """Where the cluster's dashboard is."""
    ours = os.environ.get("RAY_ADDRESS", "")  # of a cluster, or of a dashboard, as Ray's own commands take it
    named = os.environ.get("RAY_API_SERVER_ADDRESS") or (ours if ours.startswith("http") else "")
    return (job.submit.ray.address or named or DASHBOARD).rstrip("/")


def check(job: Job) -> None:
    """Raises UserError: what a Ray cluster would refuse; nobody answers, no token, or no room even if it were idle."""
    asked = job.submit
    if job.stage == "precompute" and (asked.nodes > 1 or asked.gpus_per_node):
        raise UserError(
            "to=ray places precompute actor by actor: set actors and actor_gpus, not nodes or gpus_per_node"
        )
    if asked.dry_run:  # which can be had without a cluster
        return
    nodes = ray_api.nodes(address(job))
    if not asked.ray.grows:
        require_room(needs(job), nodes, address(job))


def needs(job: Job) -> list[tuple[int, dict[str, float], bool]]:
    """What a job has reserved: how many times, what on one node, and whether each time on another one."""
    asked, cfg = job.submit, job.config
    if job.stage == "precompute":
        decoding = 0 if cfg.decode_actors else cfg.decode_workers
        actors = (cfg.actors, {"CPU": float(cfg.threads + decoding), "GPU": float(cfg.actor_gpus)}, False)
        return [actors, (cfg.decode_actors, {"CPU": float(cfg.decode_actor_cpus)}, False)]
    if job.stage not in TRAINING:
        return [(1, {"CPU": float(asked.ray.cpus or 1), "GPU": float(asked.gpus_per_node)}, False)]
    ranks = RanksConfig(
        ranks_per_node=asked.ranks_per_node, gpus_per_node=asked.gpus_per_node, cpus_per_rank=asked.ray.cpus
    )
    return [(asked.nodes, ranks.of_node(cfg.engine.threads), True)]


def require_room(wanted: list[tuple[int, dict[str, float], bool]], nodes: list[dict[str, float]], where: str) -> None:
    """Raises UserError unless the nodes' resources would do, if nobody else had any."""
    free = [dict(node) for node in nodes]
    for count, each, apart in wanted:
        placed = 0
        for node in sorted(free, key=lambda node: -node.get("CPU", 0.0)):
            while placed < count and all(node.get(name, 0.0) >= amount for name, amount in each.items()):
                placed += 1
                for name, amount in each.items():
                    node[name] = node.get(name, 0.0) - amount
                if apart:
                    break
        if placed < count:
            wants = f"{count} {'nodes' if apart else 'places'} with {ray_api.amounts(each)} each"
            has = "; ".join(sorted(ray_api.amounts(node) for node in nodes))
            raise UserError(
                f"the job needs {wants}, and the cluster at {where} has room for {placed}: {has}; ask for less, or set "
                "ray.grows=true where an autoscaler adds nodes"
            )


def script(job: Job) -> str:
    """The request as YAML, and the same as a line for a shell."""
    sent = request(job)
    asked: str = yaml.safe_dump(sent, sort_keys=False, width=1000)
    return f"# {_command(job, sent)}\n{asked}"


def _command(job: Job, sent: dict[str, Any]) -> str:
    """The ``ray job submit`` that sends the same."""
    words = ["ray", "job", "submit", "--address", address(job), "--submission-id", sent["submission_id"], "--no-wait"]
    words += ["--runtime-env-json", json.dumps(sent["runtime_env"]), "--metadata-json", json.dumps(sent["metadata"])]
    for name in ("cpus", "gpus"):
        words += [f"--entrypoint-num-{name}", str(value)] if (value := sent.get(f"entrypoint_num_{name}")) else []
    return f"{shlex.join(words)} -- {sent['entrypoint']}"


def send(job: Job) -> None:
    """Submit; say how the job is followed, or follow it.

    Raises:
        UserError: the job server refuses it.
        SystemExit: the job was followed, and has failed or was stopped.
    """
    where, sent = address(job), request(job)
    files.write_text(job.folder / "job.yaml", script(job))
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(where, headers=ray_api.headers())
    try:
        name = client.submit_job(**sent)
    except RuntimeError as error:
        why = [line for line in str(error).splitlines() if line.strip()][-1].strip()
        raise UserError(
            f"the job server at {where} refuses the job: {why} (name= gives the job another name)"
        ) from None
    for what in ("logs --follow", "status", "stop"):
        print(f"ray job {what} --address {where} {name}", file=sys.stderr, flush=True)
    if job.submit.ray.follow:
        try:
            raise SystemExit(asyncio.run(_follow(client, name)))
        except KeyboardInterrupt:
            print(f"{name} goes on", file=sys.stderr)
            raise SystemExit(130) from None
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"lost sight of {name}, which may well go on: {error}; follow it by the line above"
            ) from None


async def _follow(client: Any, name: str) -> int:
    """Print a job's output to its end; its exit code; 75 of one that was stopped."""
    async for text in client.tail_job_logs(name):
        print(text, end="", flush=True)
    while not (status := client.get_job_status(name)).is_terminal():
        await asyncio.sleep(1)
    code = client.get_job_info(name).driver_exit_code
    print(f"{name}: {status.value.lower()}", file=sys.stderr, flush=True)
    return {"SUCCEEDED": 0, "STOPPED": STOPPED}.get(status.value, int(code or 1))
