"""Lengths of rows, from tables or assumed."""

from __future__ import annotations

from pathlib import Path

from cluster.fit.rows import Rows, read_rows
from tests import training


def test_rows_come_from_the_tables(tmp_path: Path) -> None:
    root = training.shard_set(tmp_path / "set")
    rows, assumed = read_rows([str(root)], training.TARGET, ["train"])
    assert not assumed
    assert 2 <= rows.positions <= rows.longest_positions <= 16
    assert 2 <= rows.tokens <= rows.longest_tokens <= 9
    assert read_rows([str(tmp_path / "none")], "x", ["train"])[1]
    assert rows.piece(100, 100) == 4 * rows.longest_positions  # no utterance is cut
    assert Rows().batch(samples=12, tokens=0, split=1).items == 12
    assert Rows().batch(samples=0, tokens=4000, split=2).tokens <= 2000
