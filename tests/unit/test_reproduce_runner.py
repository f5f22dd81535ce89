"""The runner with real child processes: order, what is done, what fails, what is interrupted."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tools.reproduce.graph import Item
from tools.reproduce.runner import Book, Failed, run_items, tail

WORK = """
import pathlib, signal, sys, time
name, how = sys.argv[1], sys.argv[2]
with open("order.txt", "a") as file:
    file.write(name + "\\n")
print("this is", name)
if how == "fail" and not pathlib.Path("mended").exists():
    sys.exit(3)
if how == "wait" and not pathlib.Path("mended").exists():
    signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path("saved").touch(), sys.exit(75)))
    pathlib.Path("waiting").touch()
    time.sleep(60)
if how != "nothing":
    pathlib.Path(name).touch()
"""


@pytest.fixture(autouse=True)
def _a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work.py").write_text(WORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def item(name: str, how: str = "do", needs: tuple[str, ...] = (), keeps: Path | None = None) -> Item:
    return Item(name, "kind", ("work", name, how), needs, Path(name), (), keeps)


def run(*items: Item, jobs: int = 1) -> list[Failed]:
    return run_items(items, Path("root"), jobs)


def order() -> list[str]:
    return Path("order.txt").read_text().split()


def test_the_first_that_can_begin_begins_and_nothing_is_done_twice(capsys: pytest.CaptureFixture[str]) -> None:
    work = (item("a"), item("b", needs=("a",)), item("c"), item("d", needs=("b", "c")))
    assert run(*work) == []
    assert order() == ["a", "b", "c", "d"]
    assert "[4/4] d done" in capsys.readouterr().out
    assert run(*work) == []
    assert len(order()) == 4
    Path("c").unlink()
    assert run(*work) == []
    assert order()[4:] == ["c", "d"]  # another c makes another d
    assert run(*work) == []
    assert len(order()) == 6


def test_two_at_a_time_wait_for_what_they_need() -> None:
    assert run(item("a"), item("b", needs=("a",)), item("c"), item("d", needs=("b", "c")), jobs=2) == []
    assert sorted(order()[:2]) == ["a", "c"]
    assert order()[3] == "d"


def test_a_failed_item_stops_what_needs_it_alone_and_is_tried_again() -> None:
    work = (item("a"), item("b", "fail", ("a",)), item("c", needs=("b",)), item("d", needs=("c",)), item("e"))
    failed = {one.name: one for one in run(*work)}
    assert set(failed) == {"b", "c", "d"}
    assert failed["b"].why == "exit code 3"
    assert "left out" in failed["c"].why
    assert "left out" in failed["d"].why
    assert "this is b" in tail(failed["b"].log)
    assert order() == ["a", "b", "e"]
    Path("mended").touch()
    assert run(*work) == []
    assert order()[3:] == ["b", "c", "d"]


def test_an_item_that_leaves_nothing_has_failed() -> None:
    (failed,) = run(item("a", "nothing"))
    assert failed.why == "it made no a"


def test_other_words_run_again_with_all_that_follows_unless_a_folder_is_gone_on_in() -> None:
    run(item("a"), item("b", needs=("a",)))
    assert run(item("a", "else"), item("b", needs=("a",))) == []
    assert order() == ["a", "b", "a", "b"]
    Path("folder").mkdir()
    run(item("t", keeps=Path("folder")))
    (failed,) = run(item("t", "else", keeps=Path("folder")))
    assert "remove it, or give another out=FOLDER" in failed.why
    assert order()[4:] == ["t"]
    Path("folder").rmdir()
    assert run(item("t", "else", keeps=Path("folder"))) == []


def test_a_signal_lets_children_save_and_the_next_start_goes_on() -> None:
    work = (item("a"), item("b", "wait", ("a",)))

    def interrupt() -> None:
        until = time.monotonic() + 30
        while not Path("waiting").exists() and time.monotonic() < until:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run(*work)
    assert Path("saved").exists()
    book = Book(Path("root"), work)
    assert [book.is_done(one) for one in work] == [True, False]
    Path("mended").touch()
    assert run(*work) == []
    assert order() == ["a", "b", "b"]


def test_what_an_item_takes_is_told_by_its_row_first_and_else_by_its_kind() -> None:
    work = [item("row-0"), item("row-1"), item("other-0")]
    book = Book(Path("root"), work)
    assert book.expected_s(work[1]) is None
    book.write(work[0], 10.0, done=True)
    book.write(work[2], 30.0, done=True)
    assert book.expected_s(work[1]) == 10.0
    assert book.expected_s(item("third-0")) == 20.0
