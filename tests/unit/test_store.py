"""A folder's own ways; what folders and buckets have in common is in test_bucket.py."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from sm_train.data.store import Folder


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK])
def test_without_hard_links_a_file_is_still_written_by_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", no_links)
    places, won = [Folder(tmp_path / str(i)) for i in range(2)], list[int]()
    assert places[0].write_new("deep/a", b"1")
    assert not places[0].write_new("deep/a", b"2")
    assert places[0].read("deep/a") == b"1"
    gate = threading.Barrier(4)
    monkeypatch.setattr(os, "getpid", threading.get_ident)  # as of processes of their own

    def write(number: int) -> None:
        gate.wait()
        if places[1].write_new("b", b"%d" % number):
            won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert places[1].read("b") == b"%d" % won[0]
    assert os.listdir(tmp_path / "1") == ["b"]


def test_other_errors_of_a_link_come_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(OSError, match="disk full"):
        Folder(tmp_path).write_new("a", b"1")
    assert os.listdir(tmp_path) == []
