"""One driver at a time, with real processes: in a folder, and on a storage with S3's interface."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from sm_train.data import owner, processes, store
from sm_train.errors import UserError
from tests import builders, storage

# A driver that holds a set until a file appears, then completes it.
DRIVER = """
import sys, time
from pathlib import Path
from sm_train.data import owner, store
from sm_train.errors import run_command

def main(argv):
    uri, name, start, go, owner.BEAT_S = *argv[:4], float(argv[4])
    place = store.at(uri)
    print("ready", flush=True)
    while not Path(start).exists():
        time.sleep(0.001)
    with owner.hold(place) as held:
        print("holds", flush=True)
        while not Path(go).exists():
            time.sleep(0.01)
        held.write("dataset.json", name.encode())

run_command(main)
"""


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, storage.s3_server(patch):
        yield "s3://bucket"


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.slow)])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place for a set."""
    if request.param == "folder":
        return str(tmp_path / "set")
    return f"{request.getfixturevalue('bucket')}/{request.node.originalname}"


class Drivers:
    """Processes that hold a set, by name; those that are left at the end are killed."""

    def __init__(self, uri: str, folder: Path) -> None:
        self.uri, self.folder, self.all = uri, folder, dict[str, subprocess.Popen[str]]()

    def start(self, name: str, beat_s: float = 0.2) -> subprocess.Popen[str]:
        argv = [self.uri, name, str(self.folder / "start"), str(self.folder / "go"), str(beat_s)]
        self.all[name] = subprocess.Popen(
            [sys.executable, "-c", DRIVER, *argv], cwd=builders.ROOT, env=builders.child_env(),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        return self.all[name]

    def say(self, name: str, word: str) -> None:
        out = self.all[name].stdout
        assert out is not None
        line = out.readline().strip()
        assert line == word, self.all[name].communicate()[1]

    def touch(self, what: str) -> None:
        (self.folder / what).touch()


@pytest.fixture
def drivers(uri: str, tmp_path: Path) -> Iterator[Drivers]:
    made = Drivers(uri, tmp_path)
    yield made
    for process in made.all.values():
        if process.poll() is None:
            process.kill()
        process.communicate()


def leases(uri: str) -> list[str]:
    return store.at(uri).names(owner.FOLDER)


def test_of_those_that_start_at_once_one_holds_and_the_others_say_so(drivers: Drivers, uri: str) -> None:
    names = ["a", "b", "c"]
    for name in names:
        drivers.start(name)
    for name in names:
        drivers.say(name, "ready")
    drivers.touch("start")
    end = time.monotonic() + 60
    while sum(drivers.all[name].poll() is not None for name in names) < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    (winner,) = (name for name in names if drivers.all[name].poll() is None)
    for name in set(names) - {winner}:
        out, err = drivers.all[name].communicate()
        assert (drivers.all[name].returncode, out) == (2, "")
        assert err.startswith(f"error: {uri}: another driver ")
        assert err.count("\n") == 1
        if "at work" in err:
            assert f"pid {drivers.all[winner].pid}, since 20" in err
    assert store.at(uri).names() == []
    drivers.touch("go")
    out, err = drivers.all[winner].communicate()
    assert (drivers.all[winner].returncode, out, err) == (0, "holds\n", "")
    assert store.at(uri).read("dataset.json") == winner.encode()
    assert leases(uri) == []
    assert not owner.is_left(uri)


def test_the_lease_of_a_killed_driver_is_taken_at_once(drivers: Drivers, uri: str) -> None:
    drivers.touch("start")
    drivers.start("a", beat_s=1000)  # so that waiting for its heartbeats would be the end of this test
    drivers.say("a", "ready")
    drivers.say("a", "holds")
    drivers.all["a"].kill()  # and nobody asks for its exit code
    drivers.start("b")
    drivers.say("b", "ready")
    drivers.say("b", "holds")
    assert "000002.json" in leases(uri)
    drivers.touch("go")
    assert drivers.all["b"].wait() == 0
    assert leases(uri) == []


def test_a_stopped_driver_is_overtaken_and_leaves_without_a_commit(drivers: Drivers, uri: str) -> None:
    drivers.touch("start")
    drivers.start("a")
    drivers.say("a", "ready")
    drivers.say("a", "holds")
    drivers.all["a"].send_signal(signal.SIGSTOP)
    drivers.start("b")
    drivers.say("b", "ready")
    drivers.say("b", "holds")
    drivers.all["a"].send_signal(signal.SIGCONT)
    _, err = drivers.all["a"].communicate(timeout=60)
    assert drivers.all["a"].returncode == 2
    assert err.startswith(f"error: {uri}: another driver has taken over (host ")
    assert f"pid {drivers.all['b'].pid}, " in err
    assert err.count("\n") == 1
    assert store.at(uri).names() == []
    assert drivers.all["b"].poll() is None
    drivers.touch("go")
    assert drivers.all["b"].wait() == 0
    assert store.at(uri).read("dataset.json") == b"b"
    assert leases(uri) == []


def test_a_stopped_driver_that_wakes_when_all_is_done_writes_nothing(drivers: Drivers, uri: str) -> None:
    drivers.touch("start")
    drivers.start("a")
    drivers.say("a", "ready")
    drivers.say("a", "holds")
    drivers.all["a"].send_signal(signal.SIGSTOP)
    drivers.touch("go")  # its next deed is to commit
    drivers.start("b")
    assert drivers.all["b"].wait(60) == 0
    drivers.all["a"].send_signal(signal.SIGCONT)
    _, err = drivers.all["a"].communicate(timeout=60)
    assert drivers.all["a"].returncode == 2
    assert "another driver has taken over" in err
    assert store.at(uri).read("dataset.json") == b"b"


def test_a_lease_of_another_machine_counts_by_its_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = store.Folder(tmp_path)
    facts = {"host": "node7", "pid": 4, "process": "4-5-ffffffffffff", "beat_s": 0.1, "began": "yesterday"}
    place.write_new(".owner/000007.json", json.dumps(facts).encode())
    stop = threading.Event()

    def beat() -> None:
        count = 0
        while not stop.wait(0.05):
            count += 1
            place.write(".owner/000007.beat", str(count).encode())

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(UserError, match=r"at work there \(host node7, pid 4, since yesterday\); wait for its end, or"):
        owner.hold(place).__enter__()
    stop.set()
    thread.join()
    with owner.hold(place) as held:
        assert "000008.json" in held.names(owner.FOLDER)
    assert os.listdir(tmp_path) == []


def test_a_pid_that_was_given_again_is_not_its_holder(tmp_path: Path) -> None:
    pid, start, machine = processes.own().split("-")
    place = store.Folder(tmp_path)
    facts = {"host": "here", "pid": int(pid), "process": f"{pid}-{start}1-{machine}", "beat_s": 1000.0}
    place.write_new(".owner/000001.json", json.dumps(facts).encode())
    with owner.hold(place):
        pass


@pytest.mark.parametrize("damaged", [b"", b"[1]", b'{"half": '])
def test_a_damaged_lease_counts_by_its_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bytes
) -> None:
    monkeypatch.setattr(owner, "BEAT_S", 0.05)
    place = store.Folder(tmp_path)
    place.write(".owner/000003.json", damaged)
    with owner.hold(place):
        assert "000004.json" in place.names(owner.FOLDER)


def test_a_holder_whose_lease_is_gone_or_outnumbered_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "BEAT_S", 1000.0)  # so that it is found at the write
    for number, change in enumerate(("gone", "outnumbered", "another's")):
        place = store.Folder(tmp_path / str(number))
        holding = owner.hold(place)
        held = holding.__enter__()
        held.write("fine", b"1")
        if change == "gone":
            place.remove(owner.FOLDER)
        else:
            place.write(f".owner/00000{3 - number}.json", b"{}")
        deeds = [
            partial(held.write, "x", b"1"), partial(held.write_new, "x", b"1"), partial(held.remove, "fine"),
            held.sweep, partial(held.publish, tmp_path, "x", "y"), partial(holding.__exit__, None, None, None),
        ]  # fmt: skip
        for deed in deeds:
            with pytest.raises(UserError, match="another driver has taken over"):
                deed()
        assert place.names() == ["fine"]


def test_an_error_inside_comes_out_and_leaves_no_lease(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR2)
    with pytest.raises(ZeroDivisionError), owner.hold(tmp_path):
        1 / 0  # noqa: B018
    assert os.listdir(tmp_path) == []
    assert signal.getsignal(signal.SIGUSR2) is before


def test_a_thread_that_is_not_the_main_one_finds_out_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "BEAT_S", 0.02)
    said: list[str] = []

    def work() -> None:
        try:
            with owner.hold(tmp_path):
                store.Folder(tmp_path).write(".owner/000002.json", b"{}")
                time.sleep(0.1)
        except UserError as error:
            said.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "another driver has taken over" in said[0]


def test_a_signal_from_outside_means_nothing(tmp_path: Path) -> None:
    with owner.hold(tmp_path) as held:
        signal.raise_signal(signal.SIGUSR2)
        held.write("fine", b"1")
    assert os.listdir(tmp_path) == ["fine"]
