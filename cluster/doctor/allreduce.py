"""All-reduce across the ranks, its bandwidth and latency: the real ones under torchrun or srun, else two of its own.

python -m cluster.doctor.allreduce        one rank, by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; a line of JSON
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from cluster.doctor.findings import FAIL, OK, WARN, Finding
from cluster.launch import address_of, rank_variables
from cluster.training.ranks import Place, code_first, free_port
from sm_train.data import processes
from sm_train.errors import exit_hard, printable
from sm_train.train.engines.network import choose_interface

NAME = "all-reduce"
_BYTES, _REPEATS, _SMALL_REPEATS = 64 << 20, 3, 20
_ROOM = 1 << 15  # bytes of findings that a rank can send
_REMEDY = (
    "the ranks cannot reach each other: check MASTER_ADDR and MASTER_PORT, firewalls between nodes, and that "
    "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME, if set, names an interface of every node; NCCL_DEBUG=INFO says more"
)


def place() -> tuple[int, int]:
    """This process's rank and the world size, as torchrun says, or srun, whose variables are put into torchrun's.

    Raises:
        UserError: the first node of srun has no address.
    """
    env = os.environ
    # A batch script has SLURM_NTASKS and SLURM_PROCID too, and is one process: a step alone has ranks.
    if "RANK" not in env and "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        env.update(rank_variables(env, address_of))
    return int(env.get("RANK", "0")), int(env.get("WORLD_SIZE", "1"))


def join(limit_s: float) -> torch.device:
    """Join the ranks; each on its GPU if there are any, else over gloo.

    Raises:
        RuntimeError, ValueError: they do not meet within the limit.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    choose_interface()
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl", timeout=timedelta(seconds=limit_s))
    return device


def measure(device: torch.device, size: int = _BYTES) -> dict[str, Any]:
    """Sum tensors over the ranks: whether the sum is right, its bandwidth and latency.

    The bandwidth is NCCL's bus bandwidth, 2 (W - 1) / W x bytes / seconds, which does not depend on W.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    large = torch.full((size // 4,), float(rank + 1), device=device)
    small = torch.ones(2, device=device)
    for tensor in (small, large):  # connections are made here
        dist.all_reduce(tensor)
    is_right = bool((large == world_size * (world_size + 1) / 2).all())
    latency_s = _timed(small, device, _SMALL_REPEATS)
    took_s = _timed(large, device, _REPEATS)
    bus = 2 * (world_size - 1) / world_size * size / took_s
    return {"ranks": world_size, "is_right": is_right, "mb_s": bus / 1e6, "latency_us": 1e6 * latency_s}


def _timed(tensor: torch.Tensor, device: torch.device, repeats: int) -> float:
    begun = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(tensor)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begun) / repeats


def judged(found: dict[str, Any], how: str) -> Finding:
    """What a measurement says."""
    text = (
        f"{found['ranks']} ranks {how}: {found['mb_s']:,.0f} MB/s on the bus ({_BYTES >> 20} MiB), "
        f"latency {found['latency_us']:,.0f} us"
    )
    if not found["is_right"]:
        return Finding(FAIL, NAME, f"{text}, and the sum is wrong", "a device or a link corrupts data: take it out")
    return Finding(OK, NAME, text)


def here(limit_s: float = 40.0, ranks: int = 2, env: dict[str, str] | None = None) -> Finding:
    """All-reduce over gloo between processes of this machine, which are started and ended here."""
    place = Place(0, 1, ranks, "127.0.0.1", free_port())
    common = {**os.environ, **code_first(), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **(env or {})}
    command = [sys.executable, "-m", "cluster.doctor.allreduce", str(limit_s)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, env=common | place.env(rank), **pipes) for rank in range(ranks)]
    end = time.monotonic() + limit_s
    try:
        said = [process.communicate(timeout=max(end - time.monotonic(), 0.1)) for process in started]
    except subprocess.TimeoutExpired:
        return Finding(FAIL, NAME, f"{ranks} processes of this machine did not meet within {limit_s:.0f} s", _REMEDY)
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
    failed = [
        err.strip().splitlines()[-1:] for process, (_, err) in zip(started, said, strict=True) if process.returncode
    ]
    if failed:
        why = printable(" ".join(failed[0]), 200)
        return Finding(FAIL, NAME, f"{len(failed)} of {ranks} processes of this machine ended early: {why}", _REMEDY)
    return judged(json.loads(said[0][0]), "of this machine over gloo")


def meet(limit_s: float = 60.0) -> Finding | None:
    """Join the real ranks, before any of them is busy with checks of its own; what went wrong."""
    rank, world_size = place()
    try:
        join(limit_s)
    except (RuntimeError, ValueError) as error:
        return _broken(f"rank {rank} of {world_size} on {socket.gethostname()}", error)
    return None


def across(later_s: float) -> tuple[Finding, dist.ProcessGroup | None]:
    """All-reduce across the ranks that have met; every rank must call it at once.

    Returns:
        what was measured; and a group for :func:`gathered`, whose ranks wait ``later_s`` for each other, as one may
        be busy with checks by then. None if the ranks have failed.
    """
    try:
        found = judged(measure(_device()), f"over {dist.get_backend()}")
        return found, dist.new_group(timeout=timedelta(seconds=later_s))
    except RuntimeError as error:
        return _broken(_who(), error), None


def _device() -> torch.device:
    is_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if is_gpu else torch.device("cpu")


def _who() -> str:
    return f"rank {dist.get_rank()} on {socket.gethostname()}"


def _broken(who: str, error: Exception) -> Finding:
    return Finding(FAIL, NAME, f"{who}: {printable(' '.join(str(error).split()), 200)}", _REMEDY)


def packed(findings: Sequence[Finding], where: str) -> bytes:
    """Findings as JSON of at most _ROOM bytes, failures first; the last one says how many have no room."""
    rows = [[f.mark, f.name, f"{where}: {f.text}", f.remedy] for f in sorted(findings, key=lambda f: f.mark != FAIL)]
    for count in range(len(rows), -1, -1):
        left = len(rows) - count
        mark = FAIL if any(row[0] == FAIL for row in rows[count:]) else WARN
        more = [[mark, "ranks", f"{where}: {left} more findings", "run the doctor there"]] if left else []
        if len(data := json.dumps(rows[:count] + more).encode()) <= _ROOM:
            return data
    return b"[]"


def gathered(findings: Sequence[Finding], group: dist.ProcessGroup | None = None) -> Iterator[Finding]:
    """What the first rank of each other node warns of or fails in; every rank must call it, once they have met.

    As JSON in tensors: nothing that another machine wrote is unpickled. Ranks that are lost are a finding.
    """
    mine = [f for f in findings if f.mark in (WARN, FAIL)] if os.environ.get("LOCAL_RANK", "0") == "0" else []
    data, device = packed(mine, _who()), _device()
    try:
        sent = torch.zeros(_ROOM, dtype=torch.uint8, device=device)
        sent[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
        parts = [torch.zeros_like(sent) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, sent, group=group)
        said = [bytes(part.cpu().tolist()).rstrip(b"\0") for part in parts[1:]]
        dist.barrier(group=group)  # the first rank, whose store it is, leaves no earlier than the others
    except RuntimeError as error:
        yield _broken(_who(), error)
        return
    for data in said:
        for words in json.loads(data):
            yield Finding(*words)


def main() -> None:
    """One of the two processes of :func:`here`."""
    processes.die_with(os.getppid())
    torch.set_num_threads(1)
    found = measure(join(float(sys.argv[1])))
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.barrier()
    exit_hard(0)


if __name__ == "__main__":
    main()
