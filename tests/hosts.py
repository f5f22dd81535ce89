"""Several hosts on one machine: each has a network namespace, a name and an /etc/hosts of its own; a switch joins them.

They share the file system and the clock, as the nodes of a cluster do. A host's link can be taken down (its kernel
knows), or be unplugged behind the switch (nothing knows; packets vanish).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import pytest

from tests.builders import ROOT, child_env

NETWORK = "10.213.7"
"""The first three bytes of every host's address; the namespaces know no other network."""
# $1 the host's name, $2 its /etc/hosts, then what is run there.
_AS_HOST = """
echo "$1" > /proc/sys/kernel/hostname && mount --bind "$2" /etc/hosts && mount --bind /dev/null /etc/resolv.conf &&
shift 2 && exec "$@"
"""


@dataclass(frozen=True)
class Host:
    """One of the hosts."""

    name: str
    address: str
    namespace: str
    port: str
    """Its end of the link at the switch."""
    known: Path
    """Its /etc/hosts."""

    def start(self, command: Sequence[object], log: Path, **env: str) -> subprocess.Popen[str]:
        """Start a command here; what it says is appended to ``log``. The process's id is the command's own."""
        frame = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount", "sh", "-c", _AS_HOST, "sh"]
        with log.open("a") as out:
            return subprocess.Popen(
                [*frame, self.name, str(self.known), *map(str, command)],
                cwd=ROOT, env=child_env(**env), stdout=out, stderr=out, text=True,
            )  # fmt: skip

    def run(self, command: Sequence[object], log: Path, timeout_s: float = 30, **env: str) -> int:
        """Run a command here to its end; its exit code."""
        return self.start(command, log, **env).wait(timeout_s)

    @property
    def pids(self) -> list[int]:
        """Every process that runs here."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]

    def link(self, state: str) -> None:
        """Take the host's own link ``up`` or ``down``."""
        _ip("-n", self.namespace, "link", "set", "eth0", state)


class Hosts:
    """A context manager around some hosts; whatever still runs there at its end is killed.

    Args:
        own_name: the address that a host finds for its own name: ``address`` (as clusters have it), ``127.0.1.1`` (as
            Debian's installer writes it), or ``unknown``.
    """

    def __init__(self, folder: Path, count: int = 2, own_name: str = "address") -> None:
        if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "mount"))):
            pytest.skip("hosts of their own are network namespaces: they need root, iproute2 and util-linux")
        self.prefix = f"hosts-{os.getpid()}"
        self.switch = f"{self.prefix}-switch"
        names = [f"node-{i}" for i in range(count)]
        addresses = {name: f"{NETWORK}.{i + 1}" for i, name in enumerate(names)}
        self.all: list[Host] = []
        for i, name in enumerate(names):
            known = folder / f"{name}.hosts"
            found = {**addresses, name: addresses[name] if own_name == "address" else own_name}
            if own_name == "unknown":
                del found[name]
            known.write_text("".join(f"{a} {n}\n" for n, a in {"localhost": "127.0.0.1", **found}.items()))
            self.all.append(Host(name, addresses[name], f"{self.prefix}-{i}", f"port{i}", known))

    def __enter__(self) -> list[Host]:
        try:
            _ip("netns", "add", self.switch)
            _ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self.switch, "link", "set", "bridge", "up")
            for host in self.all:
                self._add(host)
        except subprocess.CalledProcessError as error:
            self.__exit__(None, None, None)
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        return self.all

    def _add(self, host: Host) -> None:
        _ip("netns", "add", host.namespace)
        inside = ("-n", host.namespace)
        pair = ("eth0", "netns", host.namespace, "type", "veth", "peer", "name", host.port, "netns", self.switch)
        _ip("link", "add", *pair)
        _ip(*inside, "address", "add", f"{host.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip(*inside, "link", "set", device, "up")
        _ip(*inside, "route", "add", "default", "via", f"{NETWORK}.254")
        self.plug(host)

    def plug(self, host: Host) -> None:
        """Join a host's link to the others."""
        _ip("-n", self.switch, "link", "set", host.port, "up", "master", "bridge")

    def unplug(self, host: Host) -> None:
        """Let packets from and to a host vanish; no end of a connection is told."""
        _ip("-n", self.switch, "link", "set", host.port, "nomaster")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        there = {line.split()[0] for line in _ip("netns", "list").splitlines()}
        for host in self.all:
            if host.namespace in there:
                for pid in host.pids:
                    os.kill(pid, signal.SIGKILL)
                _ip("netns", "delete", host.namespace)
        if self.switch in there:
            _ip("netns", "delete", self.switch)


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout
