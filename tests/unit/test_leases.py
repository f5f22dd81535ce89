"""Leases as they lie in a set, where no holder is a process of this machine."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from sm_train.data import leases, owner, store
from sm_train.errors import UserError


def lease(place: store.Folder, folder: str, number: int = 1) -> None:
    facts = {"host": "node7", "pid": 4, "process": "4-5-ffffffffffff", "beat_s": 0.1, "began": "yesterday"}
    place.write_new(leases.file(folder, number), json.dumps(facts).encode())


def test_the_highest_lease_of_each_share_is_found(tmp_path: Path) -> None:
    place = store.Folder(tmp_path)
    assert leases.shares(place) == set()
    for share, number in (("0/3", 1), ("0/3", 2), ("2/3", 7)):
        lease(place, leases.of_share(share), number)
    (tmp_path / leases.SHARES / "1-of-3").mkdir()  # a holder that was killed before it had a number
    assert leases.shares(place) == {(".owner-shares/0-of-3", 2), (".owner-shares/2-of-3", 7)}
    assert leases.holder(".owner-shares/2-of-3") == "share 2/3"


def test_of_many_the_one_that_lives_is_named(tmp_path: Path) -> None:
    place, stop = store.Folder(tmp_path), threading.Event()
    for i in range(20):
        lease(place, leases.of_share(f"{i}/20"))

    def beat() -> None:
        count = 0
        while not stop.wait(0.02):
            count += 1
            place.write(leases.beat(leases.of_share("13/20"), 1), str(count).encode())

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(
            UserError, match=r"share 13/20 is at work there \(host node7, pid 4, since yesterday\); wait"
        ):
            owner.hold(place).__enter__()
    finally:
        stop.set()
        thread.join()
    with owner.hold(place) as held:
        assert held.names(leases.FOLDER)
        assert held.names(leases.SHARES) == []


def test_a_dead_driver_is_removed_by_a_share_and_a_dead_share_by_a_driver(tmp_path: Path) -> None:
    """So that either is stopped if it wakes up after all."""
    place = store.Folder(tmp_path)
    lease(place, leases.FOLDER)
    with owner.hold(place, "0/2") as held:
        assert held.names(leases.FOLDER) == []
        assert held.names(leases.of_share("0/2"))
    woken = owner.hold(place, "1/2")
    mine = woken.__enter__()
    place.remove(leases.SHARES)  # as a driver does that took it for dead
    with pytest.raises(UserError, match="another driver has taken over"):
        mine.write("contract.json", b"{}")
    with pytest.raises(UserError, match="another driver has taken over"):
        woken.__exit__(None, None, None)
