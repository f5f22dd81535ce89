"""Which process left something behind, whether it is gone, and how to end with one's parent."""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import sys
from pathlib import Path

_GONE = ("Z", "X")  # a zombie has ended; nobody has asked for its exit code yet


def own() -> str:
    """This process for good: PID-START-MACHINE, where START tells apart two processes of one pid.

    MACHINE stands for one boot of one kernel and one namespace of pids in it: containers have their own. It is empty
    where the system does not tell (no /proc), and such a process is never taken for gone.
    """
    return f"{os.getpid()}-{_start(os.getpid()) or ''}-{_machine()}"


def is_gone(identity: str) -> bool:
    """Whether a process has certainly ended; False for those of other machines, of which nothing is known."""
    pid, _, rest = identity.partition("-")
    start, _, machine = rest.partition("-")
    return bool(machine) and machine == _machine() and pid.isdigit() and _has_ended(int(pid), start)


def die_with(parent: int) -> None:
    """Have the system kill this process once its parent has ended, or now if it has already (Linux only)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return hashlib.sha256(f"{boot} {os.readlink('/proc/self/ns/pid')}".encode()).hexdigest()[:12]
    except OSError:
        return ""


def _has_ended(pid: int, start: str) -> bool:
    if (found := _start(pid)) is not None:
        return found != start
    try:
        os.kill(pid, 0)  # /proc may hide what others run
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return False


def _start(pid: int) -> str | None:
    """Clock ticks from the boot to a process's start, "" once it has ended; None if that cannot be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].split()
    except OSError:
        return None
    return "" if fields[0].decode() in _GONE else fields[19].decode()
