"""Python, packages against the lock, torch against the devices, schedulers."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import sm_train
from cluster.doctor.findings import FAIL, OK, SKIP, WARN, Check, Finding
from cluster.fit import hub

LOCK = Path(str(sm_train.__file__)).parents[1] / "requirements.lock"
_NAMED = 4  # of what differs


def checks() -> list[Check]:
    """Those that need no config."""
    return [
        Check("python", python),
        Check("packages", lambda: packages(LOCK)),
        Check("torch", torch_build),
        Check("devices", devices),
        Check("hub", models),
        Check("schedulers", schedulers, 30.0),
    ]


def python(found: str = platform.python_version(), asked: str = "") -> Finding:
    """Its version, against what the package's metadata asks for."""
    asked = asked or metadata("sm_train")["Requires-Python"]
    text = f"{found} at {sys.executable}"
    if not SpecifierSet(asked).contains(found, prereleases=True):
        return Finding(FAIL, "python", f"{text}; sm_train needs {asked}", "make install PYTHON=python3.11, or later")
    return Finding(OK, "python", text)


def installed(name: str) -> str | None:
    """The version of a package, without what a build adds (+cpu, +cu126)."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return None


def packages(lock: Path, bounds: Sequence[str] | None = None) -> Finding:
    """Installed versions against a lock file, and against what the project asks for.

    Args:
        bounds: requirements, as the package's own metadata has them; None reads those.
    """
    asked = [Requirement(line) for line in (requires("sm_train") or [] if bounds is None else bounds)]
    broken = []
    for requirement in asked:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = installed(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            broken.append(f"{requirement.name} {found or 'is absent'} (needs {requirement.specifier})")
    if broken:
        return Finding(FAIL, "packages", _few(broken), "make install, in this folder, and its Python: .venv/bin/python")
    if not lock.is_file():
        return Finding(OK, "packages", f"{len(asked)} as asked for; no {lock.name} here to compare with")
    pinned = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", lock.read_text(encoding="utf-8"), re.MULTILINE))
    found_of = {name: installed(name) for name in pinned}
    differing = [f"{n} {found_of[n]} (lock: {pinned[n]})" for n in pinned if found_of[n] not in (None, pinned[n])]
    absent = [name for name in pinned if found_of[name] is None]
    if differing:
        say = f"{len(differing)} of {len(pinned)} are not as in {lock.name}: {_few(differing)}"
        return Finding(WARN, "packages", say, "pip install --no-deps -r requirements.lock, or know why not")
    less = f", {len(absent)} are not installed ({_few(absent)})" if absent else ""
    return Finding(OK, "packages", f"{len(pinned) - len(absent)} as in {lock.name}{less}")


def _few(words: Sequence[str]) -> str:
    return ", ".join(words[:_NAMED]) + (f" and {len(words) - _NAMED} more" if len(words) > _NAMED else "")


def torch_build() -> Finding:
    """What torch was built for."""
    cuda = torch.version.cuda
    built = f"CUDA {cuda} for {' '.join(torch.cuda.get_arch_list())}" if cuda else "CPU alone"
    if Path("/proc/driver/nvidia/version").exists() and not torch.cuda.is_available():
        remedy = (
            "this machine has an NVIDIA driver: rm -rf .venv; make install TORCH_INDEX=(PyTorch's index of a CUDA "
            "build that the driver knows, as .../whl/cu126)"
        )
        return Finding(FAIL, "torch", f"{torch.__version__}, built for {built}, sees no GPU", remedy)
    return Finding(OK, "torch", f"{torch.__version__}, built for {built}")


def devices() -> Iterator[Finding]:
    """Every GPU against the architectures of the wheel, and its free memory."""
    if not torch.cuda.is_available():
        yield Finding(OK, "devices", "no GPU, the CPU alone")
        return
    for index in range(torch.cuda.device_count()):
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        if why := unsuited(capability, torch.cuda.get_arch_list()):
            yield Finding(FAIL, "devices", f"cuda:{index} {name} {why}", remedy_of(capability))
            continue
        free, total = torch.cuda.mem_get_info(index)
        text = f"cuda:{index} {name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        if free < 0.9 * total:
            yield Finding(WARN, "devices", text, "another process is at work there: nvidia-smi names it")
        else:
            yield Finding(OK, "devices", text)


def unsuited(capability: tuple[int, int], arch_list: Sequence[str]) -> str:
    """Why a wheel cannot run on a device; empty if it can.

    A binary for sm_XY runs on the same X and any later Y; compute_XY is compiled when loaded, on anything later.
    """
    major, minor = capability
    for arch in arch_list:
        if found := re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", arch):
            kind, of = found[1], (int(found[2]), int(found[3]))
            if (kind == "sm" and of[0] == major and of[1] <= minor) or (kind == "compute" and of <= (major, minor)):
                return ""
    return f"is sm_{major}{minor}, and this torch has {' '.join(arch_list) or 'none'}"


def remedy_of(capability: tuple[int, int]) -> str:
    """How to install a torch that has a device's architecture."""
    build = "CUDA 12.6, the last with sm_70: .../whl/cu126" if capability < (7, 5) else "its newest CUDA"
    return f"rm -rf .venv; make install TORCH_INDEX=(PyTorch's index of builds for {build})"


def models() -> Finding:
    """Where models come from that a config names by repository."""
    found = hub.settings()
    return Finding(OK if found.is_had else FAIL, "hub", found.text, found.remedy)


def schedulers(command: Sequence[str] = ("sinfo", "--version"), limit_s: float = 10.0) -> Iterator[Finding]:
    """Ray and SLURM, if they are here."""
    ray = installed("ray")
    yield Finding(OK if ray else WARN, "ray", ray or "is not installed", "" if ray else "make install")
    if shutil.which(command[0]) is None:
        yield Finding(SKIP, "slurm", f"no {command[0]} on the PATH; to=slurm is for a machine that has it")
        return
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        text = f"{command[0]} gives no answer within {limit_s:g} s"
        yield Finding(WARN, "slurm", text, "look at slurmctld and SLURM_CONF, if SLURM is for you")
        return
    said = [*(done.stdout if done.returncode == 0 else done.stderr).strip().splitlines(), ""][0]
    if done.returncode:
        yield Finding(WARN, "slurm", f"{command[0]} fails: {said}", "set SLURM_CONF, if SLURM is for you")
    else:
        yield Finding(OK, "slurm", said)
