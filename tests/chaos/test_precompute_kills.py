"""A hundred kills on a live cluster of three nodes: encoding processes, nodes and drivers. No byte may change."""

from __future__ import annotations

import random
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sm_train.models.speech import EncoderConfig
from sm_train.precompute import PrecomputeConfig
from tests import builders
from tests.integration.precompute_jobs import Cluster, command_file, hashes, log_of, parts, poisoned, start, wait_until

pytestmark = pytest.mark.chaos

KILLS = {"worker": 70, "node": 15, "driver": 15}
UTTERANCES, PER_UNIT = 240, 2
UNIT_S = 0.5
"""What a unit takes at least."""
SPACING = (1, 5)
"""Parts that are finished between two kills: on few cores, processes that start take longer than several units."""
BOUND_S = 240.0
"""Seconds in which a job that nobody disturbs goes on, and ends."""


@dataclass
class Job:
    """One set, whose driver is started again until it ends by itself."""

    file: Path
    out: Path
    env: dict[str, str]
    drivers: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self) -> None:
        """Start a driver, the first one or the next."""
        self.drivers.append(start("cluster.precompute", self.file, f"out={self.out}", **self.env))

    @property
    def is_over(self) -> bool:
        """Whether its last driver has left."""
        return self.drivers[-1].poll() is not None

    def kill(self) -> None:
        """Kill its driver."""
        self.drivers[-1].kill()
        self.drivers[-1].communicate()

    def require_whole(self, reference: dict[str, str], ids: list[str]) -> None:
        """It ended well, and nothing is lost, twice there, or another byte than undisturbed."""
        _, err = self.drivers[-1].communicate()
        assert self.drivers[-1].returncode == 0, err
        found = pq.read_table(self.out / "utterances.parquet")["id"].to_pylist()
        assert found == ids, f"{len(set(ids) - set(found))} lost, {len(found) - len(set(found))} twice"
        assert hashes(self.out) == reference


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Three nodes, each with room for an actor; two of them may be killed."""
    made = Cluster(head_cpus=2, nodes=2)
    yield made
    made.close()


def test_a_hundred_kills_change_no_byte(encoder_folder: Path, tmp_path: Path, cluster: Cluster) -> None:
    manifest = builders.corpus(tmp_path / "corpus", UTTERANCES)
    ids = pq.read_table(manifest)["id"].to_pylist()
    encoder = EncoderConfig(path=str(encoder_folder), layer=2, device="cpu")
    cfg = PrecomputeConfig(str(manifest), "?", encoder, [], unit_utterances=PER_UNIT, batch_s=9.0, actors=3)
    file, env = command_file(cfg, tmp_path), poisoned(TEST_SLOW_S=str(UNIT_S), RAY_ADDRESS=cluster.address)

    def run(name: str, todo: list[str], rng: random.Random) -> tuple[Job, float]:
        """A job to its end, under kills for as long as some are left to be done."""
        job, begun = Job(file, tmp_path / name, env), time.monotonic()
        job.start()
        try:
            while todo and not job.is_over:
                target = parts(job.out) + rng.randint(*SPACING)
                wait_until(lambda target=target: parts(job.out) >= target or job.is_over, BOUND_S)
                time.sleep(rng.uniform(0, UNIT_S))
                if not job.is_over and strike(todo[-1], job, cluster, rng):
                    todo.pop()
            wait_until(lambda: job.is_over, BOUND_S)
        finally:
            job.drivers[-1].kill()
        return job, time.monotonic() - begun

    rng = random.Random(0)
    undisturbed, undisturbed_s = run("undisturbed", [], rng)
    reference = hashes(undisturbed.out)
    undisturbed.require_whole(reference, ids)
    todo = [kind for kind, count in KILLS.items() for _ in range(count)]
    rng.shuffle(todo)
    jobs: list[tuple[Job, float]] = []
    while todo:
        jobs.append(run(f"killed-{len(jobs)}", todo, rng))
        jobs[-1][0].require_whole(reference, ids)
    report([job for job, _ in jobs], sum(seconds for _, seconds in jobs), undisturbed_s)


def strike(kind: str, job: Job, cluster: Cluster, rng: random.Random) -> bool:
    """Kill one thing of a kind, and replace it where nobody else does; whether there was one."""
    if kind == "driver":
        job.kill()
        job.start()
    elif kind == "node":
        cluster.replace_node(rng)
    else:
        actors = cluster.actors()
        if not actors:
            return False
        rng.choice(actors).kill()
    return True


def report(jobs: list[Job], wall_s: float, undisturbed_s: float) -> None:
    """Print what the kills cost."""
    deaths = [line for job in jobs for line in log_of(job.out, "death")]
    ends = [line for job in jobs for line in log_of(job.out, "end")]
    units = Counter(line["part"] for job in jobs for line in log_of(job.out, "unit"))
    lost_s = wall_s - len(jobs) * undisturbed_s
    print(f"\n{len(jobs)} jobs of {UTTERANCES // PER_UNIT} units, {wall_s:.0f} s in all")
    print("| kills | " + " | ".join(KILLS) + " | all |")
    print("| --- | " + " | ".join("---" for _ in KILLS) + " | --- |")
    print("| number | " + " | ".join(str(n) for n in KILLS.values()) + f" | {sum(KILLS.values())} |")
    print(f"deaths of encoding processes seen by drivers: {len(deaths)}, barred: {sum(e['barred'] for e in ends)}")
    print(f"units at hand of processes that died, begun again: {sum(line['units'] for line in deaths)}")
    print(f"receipts: {units.total()} for {len(jobs) * (UTTERANCES // PER_UNIT)} units of finished sets")
    print(f"seconds lost: {lost_s:.0f}, {lost_s / sum(KILLS.values()):.1f} a kill (undisturbed: {undisturbed_s:.0f} s)")
    assert sum(e["barred"] for e in ends) == 0
