"""Memory, shared memory, limits, CPUs, and the file system of a folder."""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from cluster.doctor.findings import FAIL, OK, WARN, Check, Finding
from sm_train import files

GIB = 2**30
_LEAST_SHM, _LEAST_FILES, _LEAST_FREE = 1 * GIB, 4096, 2 * GIB
_MOST_SKEW_S = 30.0
NETWORKS = ("nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "ceph", "9p", "virtiofs", "afs", "wekafs")
_PASSING = ("tmpfs", "ramfs", "overlay")


def checks(folder: Path) -> list[Check]:
    """Those that need no config; ``folder`` is where runs go."""
    return [
        Check("memory", memory),
        Check("shm", shm),
        Check("open files", open_files),
        Check("cpus", cpus),
        Check("folder", lambda: file_system(folder), 20.0),
    ]


def host_bytes(root: Path = Path("/")) -> tuple[float, float]:
    """Memory that this process may use, and what of it is free: the machine's, or its control group's if that is less.

    The groups are the process's own and all above it, of version 2 or 1; page cache that can go counts as free.
    """
    lines = (root / "proc/meminfo").read_text().splitlines()
    kib = {words[0]: float(words[1]) for words in map(str.split, lines)}
    total, free = 1024 * kib["MemTotal:"], 1024 * kib["MemAvailable:"]
    for group, (limit, usage, cache) in _groups(root):
        try:
            most, used = ((group / name).read_text().strip() for name in (limit, usage))
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except OSError:
            continue
        if most != "max" and float(most) < 1024 * kib["MemTotal:"]:
            total = min(total, float(most))
            free = min(free, max(float(most) - float(used) + float(stat.get(cache, 0)), 0.0))
    return total, free


def _groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Control groups of this process, from its own up, with the names of their limit, usage and cache.

    A container sees its own group as the mount's root, whatever the path says: what is not there is left out.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if not kinds:
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(0 if ".." in parts else len(parts), -1, -1):
            yield mount.joinpath(*parts[:depth]), names


def memory(read: Callable[[], tuple[float, float]] = host_bytes) -> Finding:
    """Host memory."""
    total, free = read()
    text = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free < _LEAST_FREE:
        return Finding(FAIL, "memory", text, "end what fills it (top, sorted by M), or ask for more (--mem)")
    return Finding(OK, "memory", text)


def shm(folder: Path = Path("/dev/shm"), least: int = _LEAST_SHM) -> Finding:
    """Shared memory, which NCCL and Ray's object store use."""
    remedy = "start the container with --shm-size=8g (Docker) or --ipc=host; pods mount an emptyDir of medium Memory"
    if not folder.is_dir():
        return Finding(FAIL, "shm", f"{folder} does not exist", remedy)
    usage = shutil.disk_usage(folder)
    text = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free in {folder}"
    return Finding(OK, "shm", text) if usage.free >= least else Finding(FAIL, "shm", text, remedy)


def open_files(least: int = _LEAST_FILES) -> Finding:
    """The limit of open files; a soft one that is low can be raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{soft} at once, up to {hard}"
    if soft >= least:
        return Finding(OK, "open files", text)
    return Finding(WARN, "open files", text, f"ulimit -n {min(max(hard, soft), 65_536)}, before the command")


def cpus(allowed: int | None = None) -> Finding:
    """CPUs that this process may use, against the threads that it would start."""
    mine = len(os.sched_getaffinity(0)) if allowed is None else allowed
    threads, ranks = torch.get_num_threads(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    text = f"{mine} allowed of {os.cpu_count()}, {threads} thread{'s' * (threads > 1)} in each of {ranks} here"
    if threads * ranks > mine:
        remedy = f"export OMP_NUM_THREADS={max(mine // ranks, 1)}, or ask for more CPUs (--cpus-per-task)"
        return Finding(WARN, "cpus", text, remedy)
    return Finding(OK, "cpus", text)


def nearest(folder: Path) -> Path:
    """A folder, or the first one above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def kind_of(path: Path) -> str:
    """The kind of the file system that a path lies on."""
    best, kind, inside = "", "unknown", str(path.resolve())
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, found = line.split()[:3]
        mount = mount.replace("\\040", " ")
        if (inside == mount or inside.startswith(mount.rstrip("/") + "/")) and len(mount) >= len(best):
            best, kind = mount, found
    return kind


def file_system(folder: Path) -> Finding:
    """Really create, sync, rename, link and remove there, as runs and shard sets do."""
    there, name = nearest(folder), "folder"
    where, kind = f"{there} ({kind_of(there)})", kind_of(there)
    probe = there / f"{files.ASIDE}doctor-{os.getpid()}"
    begun, missing = time.monotonic(), []
    try:
        probe.mkdir()
        (probe / "a").write_bytes(b"x")
        files.sync(probe / "a")
        skew_s = (probe / "a").stat().st_mtime - time.time()
        os.replace(probe / "a", probe / "b")
        files.sync(probe)
        for what, make in (("symbolic links", os.symlink), ("hard links", os.link)):
            try:
                make(probe / "b", probe / what)
            except OSError:
                missing.append(what)
    except OSError as error:
        return Finding(FAIL, name, f"{where} cannot be written: {error.strerror}", "give a folder that you may write")
    finally:
        shutil.rmtree(probe, ignore_errors=True)
    took_ms = 1e3 * (time.monotonic() - begun)
    text = f"{where}: write, sync, rename and link took {took_ms:.0f} ms"
    if "symbolic links" in missing:
        return Finding(FAIL, name, f"{where} has no {' and no '.join(missing)}", "put runs on a POSIX file system")
    if abs(skew_s) > _MOST_SKEW_S:
        text = f"{where}: its server's clock is {abs(skew_s):.0f} s {'ahead' if skew_s > 0 else 'behind'}"
        return Finding(WARN, name, text, "set both clocks (NTP): attempts and submissions are told apart by time")
    if missing:
        return Finding(WARN, name, f"{where} has no hard links", "one driver at a time must see to a shard set there")
    if kind in _PASSING:
        return Finding(WARN, name, text, "it goes with the machine or its container; put runs on a disk")
    if kind in NETWORKS or kind.startswith("fuse"):
        return Finding(WARN, name, f"{text}, over a network", "fine for runs; put loader.cache on a local disk")
    return Finding(OK, name, text)
