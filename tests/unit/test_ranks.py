"""The ranks of a node: who they are told they are, what they print, how they end."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster.training.ranks import Place, Ranks, final, how
from sm_train.errors import LOST, STOPPED
from tests.builders import ROOT, child_env
from tests.training import wait_for

Start = Callable[[str], Ranks]
SECOND_NODE = Place(node=1, nodes=2, ranks_per_node=2, address="10.0.0.1", port=29500)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts ranks 2 and 3 with a program."""
    made: list[Ranks] = []

    def begin(program: str) -> Ranks:
        home = tmp_path / "home"
        home.mkdir(exist_ok=True)
        command = [sys.executable, "-c", program]
        made.append(Ranks(command, SECOND_NODE, tmp_path / "logs", home, {"GIVEN": "yes"}))
        return made[-1]

    yield begin
    for ranks in made:
        ranks.end(0.0)


def ended(ranks: Ranks) -> dict[int, int]:
    wait_for(lambda: len(ranks.codes()) == 2, 20)
    return ranks.codes()


def test_a_rank_knows_its_place_and_runs_this_code_in_the_job_s_folder(start: Start, tmp_path: Path) -> None:
    (tmp_path / "home/cluster").mkdir(parents=True)
    (tmp_path / "home/cluster/__init__.py").write_text("raise SystemExit('the folder\\'s own code')")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GIVEN")
    ranks = start(f"import os, cluster; print(*(os.environ[n] for n in {names}), cluster.__file__, os.getcwd())")
    assert ended(ranks) == {2: 0, 3: 0}
    rest = f"4 2 10.0.0.1 29500 yes {ROOT / 'cluster/__init__.py'} {tmp_path / 'home'}\n"
    assert ranks.output(2).decode() == f"2 0 {rest}"
    assert ranks.output(3).decode() == f"3 1 {rest}"


def test_output_is_read_once_and_kept_over_starts(start: Start, tmp_path: Path) -> None:
    first = start("import sys; print('one'); sys.exit('two')")
    assert ended(first) == {2: 1, 3: 1}
    assert sorted(first.output(2).split()) == [b"one", b"two"]
    assert first.output(2) == b""
    second = start("print('word ' * 999, '\\nlast', sep='')")
    ended(second)
    assert second.output(2).startswith(b"word")
    assert second.last_words(2) == "last\n"
    assert len((tmp_path / "logs/rank-3.log").read_text().splitlines()) == 4


def test_codes_and_signals(start: Start) -> None:
    program = "import os, signal, time; print(flush=True); time.sleep(60 if os.environ['RANK'] == '2' else 0)"
    ranks = start(program)
    wait_for(lambda: 3 in ranks.codes(), 20)
    assert ranks.codes() == {3: 0}
    ranks.signal(signal.SIGINT)
    assert ended(ranks)[2] in (1, -signal.SIGINT)


def test_who_does_not_leave_is_killed(start: Start) -> None:
    ranks = start("import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(60)")
    wait_for(lambda: bool(ranks.output(2)), 20)
    wait_for(lambda: bool(ranks.output(3)), 20)
    ranks.end(0.1)
    assert ranks.codes() == {2: -9, 3: -9}


def test_ranks_end_with_who_started_them(tmp_path: Path) -> None:
    program = f"""
import sys, time
from pathlib import Path
from cluster.training.ranks import Place, Ranks
ranks = Ranks([sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"], Place(0, 1, 2, "x", 1),
              Path({str(tmp_path)!r}), Path("."), {{}})
while not (ranks.output(0) or ranks.output(1)):
    time.sleep(0.01)
print("up", flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=child_env(), stdout=subprocess.PIPE)
    assert parent.stdout
    assert parent.stdout.readline() == b"up\n"
    below = psutil.Process(parent.pid).children(recursive=True)
    assert len(below) == 2
    parent.kill()
    parent.communicate()
    assert psutil.wait_procs(below, timeout=20)[1] == []


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ({}, None),
        ({0: 0, 1: 0}, None),
        ({0: LOST, 1: -9}, None),
        ({0: LOST, 1: 2}, 2),
        ({0: 1, 1: 2}, 2),
        ({0: LOST, 1: 1}, 1),
        ({0: STOPPED, 1: 1}, 1),
        ({0: STOPPED, 1: -9}, STOPPED),
    ],
)
def test_the_code_that_ends_a_run(codes: dict[int, int], code: int | None) -> None:
    assert final(codes) == code


def test_codes_in_words() -> None:
    assert [how(code) for code in (-9, LOST, 2)] == [
        "killed by SIGKILL", "left, as another rank was lost", "ended with code 2"
    ]  # fmt: skip
