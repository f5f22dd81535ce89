"""A real SLURM of two nodes on this host, for tests: munged, slurmctld and two slurmd of its own, on free ports.

    python -m tests.slurm.scheduler       # stays until Ctrl-C; prints the SLURM_CONF that sbatch and the like need

Everything lives in one temporary folder and in a PID namespace of its own: when its first process ends, or the process
that started it, the kernel ends whatever SLURM has started. A munged or SLURM that the machine already runs is not
touched. The nodes n1 and n2 are this host twice, with two CPUs and two GPUs (in SLURM's books alone) each; their names
do not resolve.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from functools import partial
from io import StringIO
from pathlib import Path

import pytest

from cluster import submit
from sm_train.data.processes import die_with
from tests.builders import ROOT
from tests.training import free_port

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "squeue", "unshare")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
DAEMONS = Path(__file__).with_name("daemons.sh")
SBIN = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
SlurmdParameters=config_overrides
KillWait=5
ReturnToService=2
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=2000 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=2000 Gres=gpu:2
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=60 State=UP
PartitionName=short Nodes=n1 MaxTime=5 State=UP
"""


def missing() -> str | None:
    """Why no SLURM can run here; None if it can."""
    absent = [name for name in NEEDED if shutil.which(name, path=SBIN) is None]
    if absent:
        return f"{', '.join(absent)} missing: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "slurmd needs root"
    probe = subprocess.run(_namespace("true"), capture_output=True, text=True)
    return f"no PID namespace: {probe.stderr.strip()}" if probe.returncode else None


def _namespace(*command: str) -> list[str]:
    return ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *command]


class Scheduler:
    """Starts on entering, and is gone on leaving; ``env`` is what SLURM's commands need."""

    def __init__(self, folder: Path | None = None) -> None:
        # Not below pytest's own folders: a path of a socket holds 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir=folder))
        conf = str(self.folder / "slurm.conf")
        self.env = {"PATH": SBIN, "SLURM_CONF": conf}
        self._daemons: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Scheduler:
        host = os.uname().nodename.split(".")[0]
        ports = {0: free_port()}
        while len(set(ports.values())) < 3:
            ports |= {1: free_port(), 2: free_port()}
        folder = self.folder
        folder.chmod(0o755)
        for name in ("state", "spool-n1", "spool-n2"):
            (folder / name).mkdir()
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o400)
        (folder / "slurm.conf").write_text(CONFIG.format(host=host, ports=ports, folder=folder))
        for name in ("gpu0", "gpu1"):
            (folder / name).touch()
        (folder / "gres.conf").write_text(f"AutoDetect=off\nNodeName=n[1-2] Name=gpu File={folder}/gpu[0-1]\n")
        with (folder / "daemons.log").open("wb") as log:
            self._daemons = subprocess.Popen(
                _namespace("bash", str(DAEMONS)), cwd=folder, env={**os.environ, **self.env},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=partial(die_with, os.getpid()),
            )  # fmt: skip
        try:
            self._wait_until_idle()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait_until_idle(self, timeout_s: float = 30) -> None:
        end = time.monotonic() + timeout_s
        while self.state_of_nodes() != ["idle", "idle"]:
            assert self._daemons is not None
            if self._daemons.poll() is not None or time.monotonic() > end:
                logs = "\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in self.folder.glob("*.log"))
                raise RuntimeError(f"SLURM did not start within {timeout_s} s\n{logs}")
            time.sleep(0.1)

    def run(self, *command: str) -> str:
        """What one of SLURM's commands prints."""
        done = subprocess.run(command, env={**os.environ, **self.env}, capture_output=True, text=True, timeout=60)
        return done.stdout

    def state_of_nodes(self) -> list[str]:
        """Of n1 and n2 in SLURM's word, such as idle."""
        return self.run("sinfo", "--noheader", "--Node", "-o", "%t", "-p", "main").split()

    def submit(self, *words: str) -> list[str]:
        """Submit a stage by the command, in this process; the ids of its jobs."""
        with redirect_stdout(StringIO()) as said:
            submit.main([*words, "to=slurm"])
        return said.getvalue().split()

    def field(self, job: str, name: str) -> str:
        """What SLURM has written down of a job under a name."""
        said = self.run("scontrol", "show", "job", job, "--oneliner")
        return said.partition(f" {name}=")[2].split(" ")[0]

    def state(self, job: str) -> str:
        """A job's state in SLURM's word, such as PENDING."""
        return self.field(job, "JobState")

    def wait(self, job: str, timeout_s: float = 180) -> str:
        """The state in which a job has ended."""
        end = time.monotonic() + timeout_s
        while (state := self.state(job)) not in ENDED:
            if time.monotonic() > end:
                return f"{state} after {timeout_s} s"
            time.sleep(0.1)
        return state

    def log(self, run: Path, job: str) -> str:
        """What a job of a run's submissions has said."""
        (path,) = run.glob(f"submitted/*/slurm-{job}.log")
        return path.read_text()

    def logs(self, run: Path) -> str:
        """What every job of a run's submissions has said."""
        return "\n".join(f"{path}:\n{path.read_text()}" for path in sorted(run.glob("submitted/*/*.log")))

    def __exit__(self, *_: object) -> None:
        if self._daemons is not None:
            self._daemons.kill()  # --kill-child: with it goes the namespace
            self._daemons.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Scheduler]:
    """A scheduler, with its commands and a module's submissions in the environment of this process."""
    if why := missing():
        pytest.skip(f"no SLURM can run here: {why}")
    with Scheduler() as scheduler, pytest.MonkeyPatch.context() as patch:
        for name, value in {**scheduler.env, "PYTHONPATH": str(ROOT / "tests/poison")}.items():
            patch.setenv(name, value)
        patch.chdir(scheduler.folder)  # jobs have the code of their submission alone
        yield scheduler


if __name__ == "__main__":
    if why := missing():
        sys.exit(f"error: no SLURM can run here: {why}")
    with Scheduler() as scheduler:
        print(f"export SLURM_CONF={scheduler.env['SLURM_CONF']}", flush=True)
        with suppress(KeyboardInterrupt):
            signal.pause()
