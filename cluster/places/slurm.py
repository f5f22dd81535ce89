"""Submission to SLURM: a template of cluster/slurm with what this job asks for written into it."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.again import MAX_REQUEUES
from cluster.places import partitions
from cluster.stages import TRAINING, module
from sm_train import config, files
from sm_train.errors import UserError

if TYPE_CHECKING:
    from cluster.submission import Job

TEMPLATES = Path(__file__).parents[1] / "slurm"
ARRAY, RAY, TRAIN, ONE = "precompute-array", "precompute-ray", "train", "one"
JOINING = "job-join.sbatch"
SIGNALLED = {TRAIN: "USR1", ARRAY: "TERM", RAY: "B:USR1"}
"""What is sent before the time limit: ranks save on USR1, precompute ends on TERM, as does its driver in the script."""


@dataclass(frozen=True)
class SlurmConfig:
    """What SLURM is asked for."""

    partition: str = config.key("", "partition; default: the cluster's")
    account: str = config.key("", "account to charge")
    qos: str = config.key("", "quality of service")
    time: str = config.key("", "limit, as 30 (minutes), 8:00:00 or 1-12:00:00; default: the partition's")
    signal_s: int = config.key(300, "seconds before the limit at which processes are asked to save and leave")
    cpus: int = config.key(0, "CPUs of a rank or process; 0: as many as the stage's config has threads and processes")
    mem: str = config.key("", "memory of a node, as 200G")
    constraint: str = config.key("", "features that nodes must have")
    nodelist: str = config.key("", "nodes to run on")
    options: list[str] = config.key([], "more options of sbatch, as [--exclusive, --reservation=R]")
    setup: list[str] = config.key([], "lines of shell to run first, as [module load cuda]")
    tasks: int = config.key(1, "precompute: size of the job array that shares the units")
    ray: bool = config.key(False, "precompute: one job with a Ray of its own over the nodes, instead of an array")
    max_requeues: int = config.key(
        MAX_REQUEUES, "starts again without a new checkpoint (training), or at all (precompute)"
    )

    def __post_init__(self) -> None:
        for name, least in (("signal_s", 1), ("cpus", 0), ("tasks", 1), ("max_requeues", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"slurm.{name} is {getattr(self, name)}; it must be at least {least}")
        if self.time:
            partitions.seconds(self.time)


def check(job: Job) -> None:
    """Refuse what SLURM would refuse, or would let wait for ever.

    Raises:
        UserError: no SLURM here; a partition, number of nodes, CPUs or GPUs, or a time that it does not have; or
            whatever ``sbatch --test-only`` says against the script.
    """
    submit = job.submit
    if job.stage == "precompute" and submit.nodes > 1 and not submit.slurm.ray:
        raise UserError(
            f"nodes is {submit.nodes}: precompute takes slurm.tasks=N (an array of jobs), or slurm.ray=true"
        )
    if job.stage != "precompute" and (submit.slurm.ray or submit.slurm.tasks > 1):
        raise UserError(f"slurm.ray and slurm.tasks are for precompute, not for {job.stage}")
    if (
        job.stage in ("precompute", *TRAINING)
        and submit.slurm.time
        and partitions.seconds(submit.slurm.time) <= submit.slurm.signal_s
    ):
        raise UserError(
            f"slurm.time is {submit.slurm.time}, and the signal to save and leave comes {submit.slurm.signal_s} s "
            "before its end; ask for more time, or set slurm.signal_s"
        )
    if submit.dry_run and shutil.which("sbatch") is None:
        return
    for name in ("sbatch", "sinfo"):
        if shutil.which(name) is None:
            raise UserError(
                f"to=slurm: no {name} here; submit from a login node of the cluster, or look at dry_run=true"
            )
    for identity in filter(None, submit.after.split(":")):
        if subprocess.run(["scontrol", "show", "job", identity], capture_output=True, check=False).returncode:
            why = "SLURM knows no such job, or none any more; nothing is waited for"
            print(f"warning: after={identity}: {why}", file=sys.stderr)
    where = partitions.read(_run(["sinfo", "--noheader", "--Node", f"--format={partitions.FORMAT}"]))
    slurm = submit.slurm
    processes = submit.ranks_per_node * max(_cpus(job), 1)
    partitions.check(where, slurm.partition, submit.nodes, processes, submit.gpus_per_node, slurm.time)
    for _, text in scripts(job):
        try:
            _run(["sbatch", "--test-only"], text)
        except UserError as error:
            if "not available" not in str(error) or all(node.is_up for node in where):
                raise
            print(f"warning: {error}; it waits for nodes that are down or drained", file=sys.stderr)  # sbatch takes it


def _run(command: list[str], given: str | None = None) -> str:
    """What a command of SLURM prints; its complaint becomes one line."""
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.replace(f"{command[0]}: error: ", "").replace("allocation failure: ", "").split())
        raise UserError(f"{command[0]}: {said or f'exit code {done.returncode}'}")
    return done.stdout


def script(job: Job) -> str:
    """What would be sent: one script, or that of an array and that of the job which follows it."""
    first, *rest = scripts(job)
    joined = [f"\n# Then {' '.join(_sbatch('ID'))} {name}, with the id of the first:\n\n{text}" for name, text in rest]
    return "".join([first[1], *joined])


def scripts(job: Job) -> list[tuple[str, str]]:
    """Name and text of each script of the job."""
    if job.stage != "precompute":
        return [("job.sbatch", _render(job, *_plain(job)))]
    if job.submit.slurm.ray:
        return [("job.sbatch", _render(job, RAY, job.args))]
    joining = _render(job, ONE, ["sm_train.precompute", *job.args], is_joining=True)
    return [("job.sbatch", _render(job, ARRAY, job.args)), (JOINING, joining)]


def _plain(job: Job) -> tuple[str, list[str]]:
    if job.stage in TRAINING:
        return TRAIN, [job.stage, *job.args]
    return ONE, [module(job.stage), *job.args]


def _render(job: Job, template: str, args: list[str], is_joining: bool = False) -> str:
    """The template, with this job's #SBATCH lines for its own, the job's environment, and its arguments set."""
    lines = (TEMPLATES / f"{template}.sbatch").read_text(encoding="utf-8").splitlines()
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    options = {name: value for name, value in _options(job, template, is_joining).items() if value != ""}
    kept = [line for line in lines[: last + 1] if line.removeprefix("#SBATCH --").partition("=")[0] not in options]
    env = {**job.env, "PYTHON": job.python}
    if template == RAY:
        env["FOLDER"] = str(job.there(job.folder))
    if job.submit.slurm.max_requeues != MAX_REQUEUES:
        env["SM_MAX_REQUEUES"] = str(job.submit.slurm.max_requeues)
    own = [
        *(f"#SBATCH --{name}={_quoted(str(value))}" for name, value in options.items()),
        *(f"#SBATCH {option}" for option in job.submit.slurm.options),
        *job.submit.slurm.setup,
        *(f"export {name}={shlex.quote(value)}" for name, value in env.items()),
        f"set -- {shlex.join(args)}",
    ]
    return "\n".join([*kept, *own, *lines[last + 1 :], ""])


def _quoted(value: str) -> str:
    """A value as sbatch reads it from a script."""
    return value if re.fullmatch(r"[\w./:,@%+=-]*", value) else '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def _options(job: Job, template: str, is_joining: bool) -> dict[str, object]:
    submit, slurm = job.submit, job.submit.slurm
    name = "%A_%a" if template == ARRAY else "%j"
    cpus = _cpus(job)
    options: dict[str, object] = {
        "job-name": f"{job.name}-join" if is_joining else job.name,
        "output": f"{job.there(job.folder)}/slurm-".replace("%", "%%") + f"{name}.log",
        "chdir": job.home,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "time": slurm.time,
        "mem": slurm.mem,
        "constraint": slurm.constraint,
        "nodelist": slurm.nodelist,
        "cpus-per-task": cpus or "",
    }
    if submit.gpus_per_node:
        options["gpus-per-node"] = submit.gpus_per_node
    if submit.after and not is_joining:
        options |= {"dependency": f"afterok:{submit.after}", "kill-on-invalid-dep": "yes"}
    if template in (TRAIN, RAY):
        options["nodes"] = submit.nodes
    if template == TRAIN:
        options["ntasks-per-node"] = submit.ranks_per_node
    if template in SIGNALLED:
        options["signal"] = f"{SIGNALLED[template]}@{slurm.signal_s}"
    if template == ARRAY:
        options["array"] = f"0-{slurm.tasks - 1}"
    return options


def _cpus(job: Job) -> int:
    """CPUs of a task: those asked for, or those that its threads and processes need; 0 leaves it to SLURM."""
    if job.submit.slurm.cpus or job.config is None:
        return job.submit.slurm.cpus
    cfg = job.config
    if job.stage != "precompute":
        return int(cfg.engine.threads if job.stage in TRAINING else cfg.threads)
    own = cfg.threads + (0 if cfg.decode_actors and job.submit.slurm.ray else cfg.decode_workers)
    if not job.submit.slurm.ray:
        return int(own)
    nodes = job.submit.nodes
    return int(-(-cfg.actors // nodes) * own + -(-cfg.decode_actors // nodes) * cfg.decode_actor_cpus)


def _sbatch(array: str = "") -> list[str]:
    """The command that submits a script: at once, or after an array has succeeded."""
    after = [f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes"] if array else []
    return ["sbatch", "--parsable", *after]


def send(job: Job) -> None:
    """Write the scripts, submit them, and print the id that a later job's ``after`` takes."""
    identity = ""
    for name, text in scripts(job):
        path = job.folder / name
        files.write_text(path, text)
        try:
            identity = _run([*_sbatch(identity), str(path)]).strip().partition(";")[0]
        except UserError as error:
            raise UserError(f"{error}; end the first with: scancel {identity}" if identity else str(error)) from None
        print(identity, flush=True)
        log = f"{job.there(job.folder)}/slurm-{identity}{'_*' if 'array=' in text else ''}.log"
        print(f"{name}: job {identity}; follow: tail -F {log}; end: scancel {identity}", file=sys.stderr, flush=True)
