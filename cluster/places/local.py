"""Submission to this machine, or by hand to several: a script that is started once a node."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING

from cluster.stages import module
from sm_train import files
from sm_train.errors import UserError

if TYPE_CHECKING:
    from cluster.submission import Job


def check(job: Job) -> None:
    """Raises UserError where several nodes could not find each other."""
    if job.submit.nodes > 1 and not job.submit.master_addr:
        raise UserError("to=local with nodes above 1: give master_addr=, the first node's address as the others see it")


def script(job: Job) -> str:
    """A shell script; its argument is the node's number where there are several."""
    nodes = job.submit.nodes
    lines = [
        "#!/usr/bin/env bash",
        f"# {job.name}" + (": start it on every node, with its number" if nodes > 1 else ""),
    ]
    if nodes > 1:
        lines.append(f': "${{1:?give the number of this node, 0 to {nodes - 1}}}"')
    lines.append(f"cd {shlex.quote(str(job.home))} || exit")
    lines += [f"export {name}={shlex.quote(value)}" for name, value in job.env.items()]
    return "\n".join([*lines, f"exec {_command(job)}", ""])


def _command(job: Job) -> str:
    """The line that a node runs."""
    submit = job.submit
    words = [module(job.stage), *job.args]
    if submit.ranks == 1:
        return shlex.join([job.python, "-m", *words])
    torchrun = [job.python, "-m", "torch.distributed.run", "--nproc-per-node", str(submit.ranks_per_node)]
    if submit.nodes == 1:
        return shlex.join([*torchrun, "--standalone", "-m", *words])
    torchrun += ["--nnodes", str(submit.nodes)]
    torchrun += ["--master-addr", submit.master_addr, "--master-port", str(submit.master_port)]
    return f'{shlex.join(torchrun)} --node-rank "$1" {shlex.join(["-m", *words])}'


def send(job: Job) -> None:
    """Write the script, and become it; with several nodes, say how each starts it."""
    path = job.folder / "job.sh"
    files.write_text(path, script(job))
    if job.submit.nodes == 1:
        os.execvp("bash", ["bash", str(path)])
    for node in range(job.submit.nodes):
        print(f"node {node}: bash {shlex.quote(str(job.there(path)))} {node}")
