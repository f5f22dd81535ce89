"""A submission: one stage, where it is to run, and the folder that holds what was submitted.

RUN/submitted/0001/ (RUN: the run folder of training and evaluation, the shard set of precompute and retarget)

    submission.json     stage, words, revision and digest of the code, when and by whom
    config.yaml         the resolved config, which the job is started with; prompts.yaml, those of tune
    code/               the packages as they were: the job imports these, whatever the working tree becomes
    job.*               what was sent: a script, or a request
"""

from __future__ import annotations

import getpass
import hashlib
import os
import shutil
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cluster
import sm_train
from cluster.places.ray import RayConfig
from cluster.places.slurm import SlurmConfig
from cluster.stages import TRAINING
from sm_train import config, files
from sm_train.data.shards import SUBMITTED
from sm_train.encoding.settings import PrecomputeConfig
from sm_train.errors import UserError
from sm_train.evaluate import EvaluateConfig
from sm_train.pretrain import PretrainConfig
from sm_train.runlog import REVISION, revision
from sm_train.tune import TuneConfig

SCHEMAS: dict[str, Any] = {
    "precompute": PrecomputeConfig,
    "retarget": None,
    "pretrain": PretrainConfig,
    "tune": TuneConfig,
    "evaluate": EvaluateConfig,
}
PLACES = ("local", "ray", "slurm")
_CARRIED = ("HF_HUB_OFFLINE", "HF_HOME", "TOKENIZERS_PARALLELISM")  # variables that a job has as its submitter has them


@dataclass(frozen=True)
class SubmitConfig:
    """Where a stage runs."""

    to: str = config.key("local", "local (this machine, or one line for each of several) | ray | slurm")
    nodes: int = config.key(1, "machines")
    ranks_per_node: int = config.key(1, "pretrain, tune: ranks on each of them; one a GPU")
    gpus_per_node: int = config.key(0, "GPUs on each of them")
    gpu: str = config.key("", "what GPUs they are, as A100-80, to refuse what does not fit; else this machine's own")
    dry_run: bool = config.key(False, "print what would be sent, and write and send nothing")
    workdir: str = config.key("", "folder on the nodes that the config's paths start at; default: this one")
    python: str = config.key("", "the Python of jobs; default: this one, on Ray the cluster's")
    name: str = config.key("", "of the job; default: STAGE-FOLDER")
    after: str = config.key("", "slurm: ids of jobs to wait for, with a colon between them")
    master_addr: str = config.key("", "local, several nodes: address of the first, as the others see it")
    master_port: int = config.key(29500, "local, several nodes: a free port there")
    ray: RayConfig = config.key(RayConfig(), "to=ray")
    slurm: SlurmConfig = config.key(SlurmConfig(), "to=slurm")

    def __post_init__(self) -> None:
        if self.to not in PLACES:
            raise ValueError(f"to is {self.to!r}; it must be one of {', '.join(PLACES)}")
        for name, least in (("nodes", 1), ("ranks_per_node", 1), ("gpus_per_node", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.after and self.to != "slurm":
            raise ValueError(f"after is {self.after!r}; only slurm starts a job after another: to is {self.to!r}")

    @property
    def ranks(self) -> int:
        """W, the world size of training."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Job:
    """What is submitted; every path is absolute, and as the nodes see it."""

    stage: str
    submit: SubmitConfig
    words: tuple[str, ...]
    """The stage's own, as they were given."""
    config: Any
    """The stage's resolved config; None for retarget, which has none."""
    folder: Path
    """The submission's, as this machine sees it."""
    home: Path
    """The folder that jobs run in."""
    env: dict[str, str] = field(default_factory=dict)
    """Variables of the job's processes."""

    @property
    def name(self) -> str:
        return self.submit.name or f"{self.stage}-{self.folder.parent.parent.name}"

    @property
    def python(self) -> str:
        return self.submit.python or sys.executable

    @property
    def args(self) -> list[str]:
        """What follows ``python -m MODULE``."""
        return list(self.words) if self.config is None else [str(self.there(self.folder / "config.yaml"))]

    def there(self, path: Path) -> Path:
        """A path below this folder, as the nodes see it."""
        here = Path.cwd()
        return self.home / path.relative_to(here) if path.is_relative_to(here) else path


def make(stage: str, words: list[str], submit: SubmitConfig) -> Job:
    """Read the stage's own words; nothing is written.

    Raises:
        UserError: the stage's config is mistaken, or nothing says where its run folder is.
    """
    if schema := SCHEMAS[stage]:
        cfg = config.load(schema, words, f"cluster.submit {stage}")
        run = getattr(cfg, "out", None) or cfg.run
    else:
        if not words or words[0].startswith("-"):
            raise UserError("retarget: give the shard set first, then what cluster.retarget takes")
        cfg, run = None, words[0]
    if stage in TRAINING and submit.gpus_per_node and cfg.engine.device == "auto":
        cfg = replace(cfg, engine=replace(cfg.engine, device="cuda"))  # ranks that see no GPU must not train on CPUs
    root = Path("runs", run.partition("://")[2].strip("/").replace("/", "-")) if "://" in run else Path(run)
    folder = next_folder(root.resolve() / SUBMITTED)
    home = Path(submit.workdir).absolute() if submit.workdir else Path.cwd()
    job = Job(stage, submit, tuple(words), cfg, folder, home)
    own = os.environ.get("PYTHONPATH")
    env = {
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join([str(job.there(folder / "code")), *([own] if own else [])]),
    }
    job.env.update(env | {name: os.environ[name] for name in _CARRIED if name in os.environ})
    return job


def next_folder(parent: Path) -> Path:
    """The first number that is free."""
    taken = [int(path.name) for path in parent.glob("*") if path.name.isdigit()]
    return parent / f"{max(taken, default=0) + 1:04d}"


def write(job: Job) -> None:
    """Put the code, the config and what is known of them into the submission's folder.

    Raises:
        UserError: somebody else has submitted to the same run at this moment.
    """
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        job.folder.mkdir()
    except FileExistsError:
        raise UserError(f"{job.folder} has just been taken by another submission; submit again") from None
    for package in (sm_train, cluster):
        source = Path(str(package.__file__)).parent
        shutil.copytree(source, job.folder / "code" / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    cfg = job.config
    if job.stage == "tune":  # prompts are part of what a run must go on with
        shutil.copyfile(cfg.prompts, job.folder / "prompts.yaml")
        cfg = replace(cfg, prompts=str(job.there(job.folder / "prompts.yaml")))
    if cfg is not None:
        config.dump(cfg, job.folder / "config.yaml")
    facts = {"stage": job.stage, "words": list(job.words), "submit": config.to_mapping(job.submit)}
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    python = job.submit.python if job.submit.to == "ray" else job.python  # Ray's jobs run the cluster's
    by = {"submitted": when, "user": _user(), "python": python or None, "workdir": str(job.home)}
    if head := revision():
        (job.folder / "code" / REVISION).write_text(f"{head}\n")
    code = {"revision": head, "code_sha256": digest(job.folder / "code")}
    files.write_json(job.folder / "submission.json", {**facts, **code, **by})


def _user() -> str:
    """This user's name, or number: in a container there may be no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def digest(folder: Path) -> str:
    """SHA-256 over names and contents of a folder's files."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        found.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return found.hexdigest()
