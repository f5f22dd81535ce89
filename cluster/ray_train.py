"""Train on a Ray cluster: Ray Train reserves nodes, places the ranks and starts them again when some are lost.

    python -m cluster.ray_train STAGE CONFIG nodes=N ranks_per_node=M gpus_per_node=K [key=value ...]

STAGE is pretrain or tune. It is what a Ray job runs (cluster.submit ... to=ray); by hand it joins the cluster that
RAY_ADDRESS names. Each node has one worker of Ray Train, and M ranks as its child processes. It ends with the ranks'
code: 0 done, 2 a mistake, 75 saved after a signal, 76 if ranks were lost more often than max_restarts.
"""

from __future__ import annotations

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cluster.precompute import require_reachable
from cluster.training.desk import Desk
from cluster.training.driver import Driver, Stop
from cluster.training.node import NodeJob, train_node
from cluster.training.ranks import code_first
from sm_train import config
from sm_train.errors import UserError, exit_hard, run_command
from sm_train.pretrain import PretrainConfig
from sm_train.tune import TuneConfig

SCHEMAS: dict[str, Any] = {"pretrain": PretrainConfig, "tune": TuneConfig}
USAGE = "usage: python -m cluster.ray_train pretrain|tune CONFIG nodes=N ranks_per_node=M gpus_per_node=K [key=value]"


@dataclass(frozen=True)
class RanksConfig:
    """Where the ranks of a training are placed, and how often they are started again."""

    nodes: int = config.key(1, "machines")
    ranks_per_node: int = config.key(1, "ranks on each of them")
    gpus_per_node: int = config.key(0, "GPUs reserved on each of them")
    cpus_per_rank: int = config.key(0, "CPUs reserved for a rank; 0: engine.threads and one more")
    max_restarts: int = config.key(10, "starts of all ranks after the first, when some are lost; -1: without end")
    stop_s: float = config.key(120.0, "seconds that ranks have to save in, when the job is stopped")
    folder: str = config.key("", "shared folder for the ranks' logs and Ray Train's own files; default: RUN/ray")

    def __post_init__(self) -> None:
        for name, least in (
            ("nodes", 1), ("ranks_per_node", 1), ("gpus_per_node", 0), ("cpus_per_rank", 0), ("max_restarts", -1),
            ("stop_s", 1),
        ):  # fmt: skip
            if not least <= getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")

    def of_node(self, threads: int) -> dict[str, float]:
        """What is reserved on each node."""
        cpus = float(self.ranks_per_node * (self.cpus_per_rank or threads + 1))
        return {"CPU": cpus} | ({"GPU": float(self.gpus_per_node)} if self.gpus_per_node else {})


def read(argv: list[str]) -> tuple[RanksConfig, Any, list[str]]:
    """The places asked for, the stage's config, and what follows ``python -m`` in a rank's command."""
    if not argv or argv[0] not in SCHEMAS:
        if argv and argv[0] in ("-h", "--help"):
            print(f"{USAGE}\n\nkeys:\n{config.describe(RanksConfig)}")
            raise SystemExit(0)
        raise UserError(f"stage is {argv[0] if argv else ''!r}; it must be one of {', '.join(SCHEMAS)}; {USAGE}")
    names = {field.name for field in dataclasses.fields(RanksConfig)}
    own = [word for word in argv[1:] if word.partition("=")[0] in names]
    stages = [word for word in argv[1:] if word not in own]
    asked = config.from_words(RanksConfig, own, "cluster.ray_train")
    return (
        asked,
        config.load(SCHEMAS[argv[0]], stages, f"cluster.ray_train {argv[0]}"),
        [f"sm_train.{argv[0]}", *stages],
    )


def connect() -> Any:
    """Join the cluster that RAY_ADDRESS names; returns the module ray.

    Raises:
        UserError: it names none, or one where nobody answers.
    """
    if not (address := os.environ.get("RAY_ADDRESS")):
        raise UserError("RAY_ADDRESS names no cluster; submit with cluster.submit to=ray, or set it to HOST:PORT")
    require_reachable(address)
    defaults = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    import ray

    # A job has its code by the runtime environment it was submitted with; by hand it is a folder that nodes share.
    code = None if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else {"env_vars": code_first()}
    ray.init(address=address, runtime_env=code, log_to_driver=False, logging_level="error")
    return ray


def make_trainer(asked: RanksConfig, resources: dict[str, float], folder: Path, job: NodeJob) -> Any:
    """Ray Train's part: a worker on each of ``nodes`` nodes, all started again where one raises or is lost."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    scaling = ScalingConfig(
        num_workers=asked.nodes, use_gpu=asked.gpus_per_node > 0, resources_per_worker=resources,
        placement_strategy="STRICT_SPREAD",
    )  # fmt: skip
    again = FailureConfig(max_failures=asked.max_restarts)
    run = RunConfig(name="ray_train", storage_path=str(folder), failure_config=again)
    return DataParallelTrainer(partial(train_node, job), scaling_config=scaling, run_config=run)


def make_desk(ray: Any, ranks: int) -> Any:
    """An actor on this very node: it lives as long as the driver does."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Desk).options(num_cpus=0, scheduling_strategy=here).remote(ranks)


def main(argv: list[str]) -> None:
    asked, cfg, module = read(argv)
    folder = Path(asked.folder or Path(cfg.run, "ray")).absolute()
    ray = connect()
    stop = Stop()  # after Ray, which puts a handler of its own
    desk = make_desk(ray, asked.nodes * asked.ranks_per_node)
    env = {"OMP_NUM_THREADS": str(cfg.engine.threads)} | ({} if asked.gpus_per_node else {"CUDA_VISIBLE_DEVICES": ""})
    job = NodeJob(tuple(module), asked.ranks_per_node, str(folder / "logs"), str(Path.cwd()), env, asked.stop_s, desk)
    resources = asked.of_node(cfg.engine.threads)
    fit = ThreadPoolExecutor(1).submit(make_trainer(asked, resources, folder, job).fit)
    exit_hard(Driver(asked, resources, ray, desk, stop).follow(fit))


if __name__ == "__main__":
    run_command(main)
