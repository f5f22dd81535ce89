"""Where ranks of several hosts meet, and which of a host's network interfaces leads there.

Left to itself, gloo listens at whatever address the host's own name resolves to. On many hosts that is a loopback
address (Debian's installer writes 127.0.1.1 into /etc/hosts; a name that nothing knows counts as 127.0.0.1), which the
other hosts are then told to connect to.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address

import psutil

from sm_train.errors import Lost, UserError
from sm_train.train.engines.watch import is_collective

GLOO = "GLOO_SOCKET_IFNAME"
_PLACE = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FAR = "192.0.2.1"
"""An address that no host has (RFC 5737): the way there is the default route."""


@contextmanager
def meeting() -> Iterator[None]:
    """Around what ranks do together from their first word until the watch begins, which then knows whose fault it is.

    Raises:
        Lost: a collective has failed: some rank has not come, or is gone again.
        UserError: the port is taken, or the environment names no place to meet at.
    """
    choose_interface()
    try:
        yield
    except ValueError as error:
        if "env:// rendezvous" not in str(error):  # torch's words for a variable that is not set
            raise
        raise UserError(f"{error}; ranks are started by torchrun, srun or cluster.submit") from None
    except RuntimeError as error:
        if not is_collective(error):
            raise
        rank, world_size, address, port = (os.environ.get(name) for name in _PLACE)
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"MASTER_PORT is {port}, which another process of {address} has; choose a free one"
            ) from None
        raise Lost(
            f"rank {rank} on {socket.gethostname()} does not find the others at {address}, port {port}: "
            f"{str(error).splitlines()[0][:300]}; all {world_size} ranks must be started, reach that address and have "
            f"the ports between them open ({GLOO} is {os.environ.get(GLOO, 'not set')}); the same command goes on"
        ) from None


def choose_interface() -> None:
    """Let gloo use the interface that leads to MASTER_ADDR, where ranks run on several hosts; a choice made stays.

    On the host of MASTER_ADDR, where its name may well resolve to loopback, it is the one of the default route.
    """
    sizes = os.environ.get("WORLD_SIZE", "1"), os.environ.get("LOCAL_WORLD_SIZE")
    if GLOO in os.environ or sizes[0] in ("1", sizes[1]):
        return
    for address in (os.environ.get("MASTER_ADDR", _FAR), _FAR):
        own = _own_address(address)
        if own and not ip_address(own).is_loopback and (name := _interface(own)):
            os.environ[GLOO] = name
            return


def _own_address(address: str) -> str | None:
    """This host's address on the way to another; no packet is sent."""
    with suppress(OSError):
        for family, kind, protocol, _, place in socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.connect(place)
                return str(probe.getsockname()[0])
    return None


def _interface(own: str) -> str | None:
    """The interface that has an address of this host."""
    found = (name for name, owns in psutil.net_if_addrs().items() if own in [a.address.split("%")[0] for a in owns])
    return next(found, None)
