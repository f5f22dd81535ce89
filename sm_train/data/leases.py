"""Leases as they lie in a set: who holds it, or shares of it, and whether he is still at work; see owner.py.

``.owner/000001.json`` is a lease, ``.owner/000001.beat`` what its holder rewrites; ``.owner-shares/0-of-3/`` holds
those of one share.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sm_train.data import processes, store
from sm_train.data.store import Store
from sm_train.errors import UserError

FOLDER = ".owner"
SHARES = ".owner-shares"
MISSED = 3
"""Heartbeats, after which a holder is taken for dead."""
_LOOKS = 64  # leases that are watched at once

Leases = set[tuple[str, int]]
"""Some leases, by folder and number."""


def of_share(share: str) -> str:
    """The folder of the leases of a share, which is named as "0/3"."""
    return f"{SHARES}/{share.replace('/', '-of-')}"


def holder(folder: str) -> str:
    """What the holder of a lease in this folder is called."""
    return "another driver" if folder == FOLDER else f"share {folder.rpartition('/')[2].replace('-of-', '/')}"


def shares(place: Store) -> Leases:
    """The highest lease of each share."""
    return {found for name in place.names(SHARES) for found in last(place, f"{SHARES}/{name}")}


def last(place: Store, folder: str) -> Leases:
    """The highest lease of a folder, if it has one."""
    return {(folder, number) for number in numbers(place, folder)[-1:]}


def numbers(place: Store, folder: str) -> list[int]:
    """The numbers of a folder's leases, in order."""
    names = [name.removesuffix(".json") for name in place.names(folder) if name.endswith(".json")]
    return sorted(int(name) for name in names if name.isdigit())


def refuse_living(place: Store, leases: Leases, beat_s: float) -> Leases:
    """Return the leases once all their holders are gone; several are watched side by side.

    Args:
        beat_s: between the heartbeats of a holder that does not say it.

    Raises:
        UserError: one of them is at work.
    """
    with ThreadPoolExecutor(_LOOKS) as pool:
        list(pool.map(lambda lease: _require_dead(place, lease[0], lease[1], beat_s), sorted(leases)))
    return leases


def _require_dead(place: Store, folder: str, number: int, beat_s: float) -> None:
    """Return once a lease's holder is gone: its process has ended, or it has missed its heartbeats.

    Raises:
        UserError: it is at work.
    """
    data = read(place, folder, number)
    facts = _facts(data)
    if data is None or processes.is_gone(str(facts.get("process", ""))):
        return
    beat_s = float(facts.get("beat_s", beat_s))
    first, end = _bytes(place, beat(folder, number)), time.monotonic() + MISSED * beat_s
    while time.monotonic() < end:
        time.sleep(beat_s / 4)
        if read(place, folder, number) is None:
            return
        if _bytes(place, beat(folder, number)) != first:
            raise UserError(
                f"{place.uri}: {holder(folder)} is at work there{named(data)}; wait for its end, or stop it (on its "
                "host: kill PID) and run this command again"
            )


def read(place: Store, folder: str, number: int) -> bytes | None:
    """A lease's bytes; None if it is gone."""
    return _bytes(place, file(folder, number))


def _bytes(place: Store, name: str) -> bytes | None:
    try:
        return place.read(name)
    except store.Absent:
        return None


def _facts(data: bytes | None) -> dict[str, Any]:
    try:
        facts = json.loads(data or b"{}")
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def named(data: bytes | None) -> str:
    """Who a lease says its holder is, for a message; nothing if it does not say."""
    facts = _facts(data)
    return f" (host {facts.get('host')}, pid {facts.get('pid')}, since {facts.get('began')})" if facts else ""


def file(folder: str, number: int) -> str:
    """The name of a lease."""
    return f"{folder}/{number:06d}.json"


def beat(folder: str, number: int) -> str:
    """The name of the file that its holder rewrites."""
    return f"{folder}/{number:06d}.beat"
