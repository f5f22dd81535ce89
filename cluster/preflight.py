"""What can be refused of a submission by reading its config alone."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from cluster.doctor.machine import host_bytes
from cluster.fit.need import Ranks, require_fits
from cluster.stages import TRAINING
from cluster.submission import Job
from sm_train.data import shards, store
from sm_train.data.instructions import TASKS
from sm_train.errors import UserError
from sm_train.train.origin import SCRATCH

_INPUTS = ("manifest", "mapper", "prompts", "instructions")  # keys that name a file or folder which must be there


def check(job: Job) -> None:
    """Raises UserError: ranks, devices or inputs that the stage could not begin with."""
    if job.stage in TRAINING:
        _check_ranks(job)
        _check_devices(job)
        _check_memory(job)
    else:
        _check_one_process(job)
    if job.home != Path.cwd():  # another machine has them
        return
    try:
        _check_inputs(job)
    except UserError as error:
        if not job.submit.after:
            raise
        print(f"warning: {error}; taken to come from job {job.submit.after}", file=sys.stderr)


def _check_ranks(job: Job) -> None:
    lanes, submit = job.config.batch.lanes, job.submit
    if lanes % submit.ranks:
        fitting = [ranks for ranks in range(1, lanes + 1) if lanes % ranks == 0]
        raise UserError(
            f"batch.lanes is {lanes}, which {submit.ranks} ranks ({submit.nodes} nodes of {submit.ranks_per_node}) do "
            f"not divide; ask for {', '.join(map(str, fitting))} ranks, or set batch.lanes to a multiple"
        )


def _check_devices(job: Job) -> None:
    engine, submit = job.config.engine, job.submit
    if submit.gpus_per_node and submit.gpus_per_node != submit.ranks_per_node:
        raise UserError(
            f"gpus_per_node is {submit.gpus_per_node} and ranks_per_node {submit.ranks_per_node}; a rank has one GPU: "
            "give the same number, or gpus_per_node=0 for CPUs"
        )
    if engine.device == "auto" and not submit.gpus_per_node and submit.to == "local" and torch.cuda.is_available():
        raise UserError("gpus_per_node is 0, but there are GPUs here: give their number, or engine.device=cpu")
    if engine.device == "cuda" and not submit.gpus_per_node:
        raise UserError("engine.device is 'cuda' and gpus_per_node 0; ask for GPUs, or set engine.device=cpu")
    if engine.device == "cpu" and submit.gpus_per_node:
        raise UserError(
            f"engine.device is 'cpu' and gpus_per_node {submit.gpus_per_node}, which would stand idle; "
            "set gpus_per_node=0, or engine.device=cuda"
        )


def _check_memory(job: Job) -> None:
    """What is not known of the machine that the job goes to is not judged: cluster.doctor tells it there."""
    submit, is_here = job.submit, job.submit.to == "local"
    ranks = Ranks(submit.ranks, submit.ranks_per_node, on_cpu=not submit.gpus_per_node)
    if ranks.on_cpu:
        if is_here:
            require_fits(job.config, None, ranks, host_bytes()[0])
    elif submit.gpu:
        require_fits(job.config, submit.gpu, ranks)
    elif is_here and torch.cuda.is_available():
        require_fits(job.config, float(torch.cuda.get_device_properties(0).total_memory), ranks, host_bytes()[0])


def _check_one_process(job: Job) -> None:
    submit = job.submit
    if submit.ranks_per_node > 1:
        raise UserError(f"ranks_per_node is {submit.ranks_per_node}; only {' and '.join(TRAINING)} have ranks")
    is_array = job.stage == "precompute" and submit.to == "slurm" and not submit.slurm.ray
    if submit.gpus_per_node > 1 and is_array:
        raise UserError(f"gpus_per_node is {submit.gpus_per_node}; each task of the array is one process: ask for 1")
    if is_array and job.config.encoder.device == "cuda" and not submit.gpus_per_node:
        raise UserError("encoder.device is 'cuda' and gpus_per_node 0; ask for gpus_per_node=1, or encoder.device=cpu")
    if submit.nodes > 1 and (job.stage != "precompute" or submit.to == "local"):
        raise UserError(f"nodes is {submit.nodes}; {job.stage} to {submit.to} runs on one machine")


def _check_inputs(job: Job) -> None:
    cfg = job.config
    for key in _INPUTS:
        path = getattr(cfg, key, None)
        if isinstance(path, str) and "://" not in path and path != SCRATCH and not Path(path).exists():
            raise UserError(f"{key} is {path!r}, which does not exist here; paths start at {Path.cwd()} (see workdir)")
    sets = getattr(cfg, "shards", None) if cfg is not None else job.words[0]
    for uri in sets if isinstance(sets, dict) else [sets] if isinstance(sets, str) else []:
        if "://" not in uri and not shards.is_complete(store.at(uri)):
            chained = ", or give after= its job" if job.submit.to == "slurm" else ""
            raise UserError(f"shard set {uri} does not exist, or is not complete; run precompute first{chained}")
    if job.stage == "tune" and "://" not in cfg.shards and not Path(cfg.shards, "targets", cfg.target, TASKS).exists():
        how = f"python -m cluster.retarget {cfg.shards} --name {cfg.target} --instructions FILE"
        raise UserError(f"target set {cfg.shards}/targets/{cfg.target} has no tasks; write them: {how}")
