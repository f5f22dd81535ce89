"""Train on a Ray cluster: Ray Train reserves nodes, places the ranks and starts them again when some are lost.

    python -m cluster.ray_train STAGE CONFIG nodes=N ranks_per_node=M gpus_per_node=K [key=value ...]

STAGE is pretrain or tune. It is what a Ray job runs (cluster.submit ... to=ray); by hand it joins the cluster that
RAY_ADDRESS names. Each node has one worker of Ray Train, and M ranks as its child processes. It ends with the ranks'
code: 0 done, 2 a mistake, 75 saved after a signal, 76 if ranks were lost more often than max_restarts.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cluster.desk import Desk, News
from cluster.precompute import require_reachable
from cluster.ranks import code_first, how
from cluster.ray_api import amounts
from cluster.train_node import GRACE_S, NodeJob, train_node
from sm_train import config
from sm_train.errors import LOST, STOPPED, UserError, exit_hard, printable, run_command
from sm_train.pretrain import PretrainConfig
from sm_train.tune import TuneConfig

SCHEMAS: dict[str, Any] = {"pretrain": PretrainConfig, "tune": TuneConfig}
USAGE = "usage: python -m cluster.ray_train pretrain|tune CONFIG nodes=N ranks_per_node=M gpus_per_node=K [key=value]"
_TURN_S = 0.5
_SAY_S = 30.0  # of waiting for places, before it is said
_SAY_AGAIN_S = 120.0


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


class Stop:
    """Tells when this process has been asked to end: by SIGTERM, as of ``ray job stop``, or by ctrl-c."""

    def __init__(self) -> None:
        self.asked_at: float | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._came)

    def _came(self, number: int, frame: Any) -> None:
        self.asked_at = self.asked_at or time.monotonic()


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


class Driver:
    """Prints what rank 0 prints and what becomes of the others, and passes a stop on.

    Args:
        resources: what each node is to have free.
        desk: the handle of a :class:`~cluster.desk.Desk`.
    """

    def __init__(self, asked: RanksConfig, resources: dict[str, float], ray: Any, desk: Any, stop: Stop) -> None:
        self._asked, self._resources, self._ray, self._desk, self._stop = asked, resources, ray, desk, stop
        self._attempt, self._idle_since, self._said_at = 0, time.monotonic(), 0.0
        self._is_told = False

    def follow(self, fit: Future[Any]) -> int:
        """Stay until all is over; returns the code to end with."""
        from ray.train import WorkerGroupError

        while not fit.done():
            now = time.monotonic()
            if (asked_at := self._stop.asked_at) and not self._is_told:
                self._desk.stop.remote()
                self._is_told = True
                say(f"asked to stop: ranks have {self._asked.stop_s:g} s to save in")
            news = self._show()
            self._idle_since = now if news.is_running else self._idle_since
            if asked_at and now > max(self._idle_since, asked_at) + GRACE_S * 2:
                say("stopped while no rank was at work")
                return STOPPED
            if asked_at and now > asked_at + self._asked.stop_s + GRACE_S * 2:
                say("ranks that had not saved in time are left to be killed")
                return STOPPED
            self._say_what_is_missing(now)
            time.sleep(_TURN_S)
        self._show()
        try:
            return int(fit.result().return_value)
        except WorkerGroupError as error:
            why = "; ".join(f"node {node}: {one}" for node, one in sorted(error.worker_failures.items()))
            say(f"error: ranks were lost {self._attempt} times, max_restarts is {self._asked.max_restarts}; {why}")
            return STOPPED if self._is_told else LOST

    def _show(self) -> News:
        news: News = self._ray.get(self._desk.news.remote())
        sys.stdout.buffer.write(news.output)
        sys.stdout.flush()
        for code in sorted({code for code, _ in news.ended.values()}):
            ranks = sorted(rank for rank, (other, _) in news.ended.items() if other == code)
            if code != STOPPED:
                more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
                say(f"rank {', '.join(map(str, ranks[:8]))}{more}: {how(code)}")
            if 0 not in ranks and code not in (STOPPED, LOST):  # rank 0's words have been printed
                say("\n".join(f"rank {ranks[0]}: {printable(line)}" for line in news.ended[ranks[0]][1].splitlines()))
        if news.attempt > self._attempt:
            if self._attempt:
                say(f"start {news.attempt} of the ranks (max_restarts is {self._asked.max_restarts})")
            self._attempt = news.attempt
        return news

    def _say_what_is_missing(self, now: float) -> None:
        """Say what is waited for, while ranks have no places."""
        if now < self._idle_since + _SAY_S or now < self._said_at + _SAY_AGAIN_S:
            return
        self._said_at = now
        alive = [amounts(node["Resources"]) for node in self._ray.nodes() if node["Alive"]]
        say(
            f"waiting for {self._asked.nodes} nodes with {amounts(self._resources)} free on each; the cluster has "
            f"{len(alive)} nodes ({'; '.join(sorted(alive))}), in all {amounts(self._ray.available_resources())} free"
        )


def say(text: str) -> None:
    """Print a line of the driver's own."""
    print(text, file=sys.stderr, flush=True)


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
