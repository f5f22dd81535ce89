"""Answers kept aside: what is there again, and what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from sm_train.errors import UserError
from sm_train.scoring import kept
from sm_train.scoring.kept import Answered, Kept, Work


def answered(text: str) -> Answered:
    return Answered([text, "l\u2028ine\n"], [None, text], Work(7, 3, 2, 0.5, 0.25))


def test_what_ranks_wrote_is_there_for_the_same_question_alone(tmp_path: Path) -> None:
    for rank in range(2):
        mine = Kept(tmp_path, {"seed": 0}, rank)
        mine.add(0, rank, answered(f"rank {rank}"))
        mine.close()
    found = Kept(tmp_path, {"seed": 0}).read_all({(0, 0), (0, 1)})
    assert found == {(0, 0): answered("rank 0"), (0, 1): answered("rank 1")}
    other = Kept(tmp_path, {"seed": 1})
    assert other.read() == {}
    assert len(Kept(tmp_path, {"seed": 0}).read()) == 2  # still
    other.remove()
    assert not list(tmp_path.iterdir())


def test_a_torn_line_costs_its_piece_alone(tmp_path: Path) -> None:
    mine = Kept(tmp_path, {})
    mine.add(0, 0, answered("whole"))
    mine.add(0, 1, answered("torn"))
    mine.close()
    (path,) = mine.folder.glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-9])
    again = Kept(tmp_path, {})
    assert again.read() == {(0, 0): answered("whole")}
    again.add(0, 1, answered("again"))
    again.close()
    assert again.read()[0, 1] == answered("again")


def test_what_no_rank_wrote_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_PATIENCE_S", 0.0)
    with pytest.raises(UserError, match=r"2 of 2 pieces.*file system that all of them share"):
        Kept(tmp_path, {}).read_all({(0, 0), (1, 0)})


def test_work_adds_up() -> None:
    assert Work(1, 2, 3, 0.5, 1.0) + Work(4, 5, 6, 0.5, 1.0) == Work(5, 7, 9, 1.0, 2.0)
