from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sm_train import files
from sm_train.data import mds, shards, store
from sm_train.data.samples import FEATS, Samples
from sm_train.errors import UserError
from sm_train.records import Quarantined

COLUMNS = {"id": "str", "feats": "ndarray:float16"}
CONTRACT = {"schema": 1, "layer": 2}


def write(root: Path, part: int, ids: list[str], bad: tuple[str, ...] = (), width: int = 3) -> str:
    name = f"part-{part:07d}"
    samples = [{"id": i, "feats": np.full((4, width), len(i), np.float16)} for i in ids]
    rows = [{"id": i, "num_frames": 4} for i in ids]
    shards.write_part(
        root, name, COLUMNS, samples, rows, [Quarantined(i, "silent", "-") for i in bad], {"width": width}
    )
    return name


def complete(root: Path) -> Path:
    shards.open_set(root, CONTRACT)
    parts = [write(root, 0, ["a", "bb"]), write(root, 1, [], bad=("c", "d")), write(root, 2, ["eee"], bad=("f",))]
    shards.commit(root, parts, CONTRACT, "utterances.parquet")
    return root


def test_a_set_is_its_parts_in_order(tmp_path: Path) -> None:
    root = complete(tmp_path / "set")
    table = shards.read_table(root, "utterances.parquet")
    assert table.column("id").to_pylist() == ["a", "bb", "eee"]
    assert table.column("ordinal").to_pylist() == [0, 1, 2]
    assert table.column("part").to_pylist() == ["part-0000000", "part-0000000", "part-0000002"]
    assert pq.read_table(root / "quarantine.parquet").column("id").to_pylist() == ["c", "d", "f"]
    dataset = files.read_json(root / shards.DATASET)
    assert (dataset["num_committed"], dataset["num_quarantined"], dataset["num_parts"]) == (3, 3, 3)
    assert (dataset["width"], dataset["layer"]) == (3, 2)
    with Samples(root, table, FEATS) as samples:
        assert [samples[row]["id"] for row in (2, 0, 1)] == ["eee", "a", "bb"]
        assert samples[1]["feats"].shape == (4, 3)
        assert not samples[1]["feats"].flags.writeable
    assert not list(root.glob(".*"))


def test_a_set_of_quarantined_rows_alone_is_an_error(tmp_path: Path) -> None:
    part = write(tmp_path, 0, [], bad=("c", "d"))
    with pytest.raises(UserError, match="all 2 utterances are quarantined; the first: 'c'"):
        shards.commit(tmp_path, [part], CONTRACT, "utterances.parquet")
    assert not shards.is_complete(tmp_path)


def test_parts_that_state_different_facts_do_not_join(tmp_path: Path) -> None:
    parts = [write(tmp_path, 0, ["a"]), write(tmp_path, 1, ["b"], width=5)]
    with pytest.raises(UserError, match=r"part-0000001: width is 5 there, but 3 is asked for; remove the part"):
        shards.commit(tmp_path, parts, CONTRACT, "utterances.parquet")


def test_a_contract_holds_from_the_first_part_on(tmp_path: Path) -> None:
    root = tmp_path / "set"
    shards.open_set(root, {"layer": 99})
    shards.open_set(root, CONTRACT)  # nothing was encoded under the first one
    write(root, 0, ["a"])
    shards.open_set(root, CONTRACT)
    with pytest.raises(UserError, match="layer is 2 there, but 3 is asked for; give another folder"):
        shards.open_set(root, {**CONTRACT, "layer": 3})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not empty and holds no shard set"):
        shards.open_set(tmp_path / "other", CONTRACT)


def test_incomplete_and_absent_sets_are_told_apart(tmp_path: Path) -> None:
    shards.open_set(tmp_path / "begun", CONTRACT)
    with pytest.raises(UserError, match="is not complete; run its precompute command again"):
        shards.read_table(tmp_path / "begun", "utterances.parquet")
    with pytest.raises(UserError, match="does not exist"):
        shards.read_table(tmp_path / "absent", "utterances.parquet")


def test_writing_a_part_again_and_clearing_up(tmp_path: Path) -> None:
    write(tmp_path, 0, ["a"])
    before = mds.file_digest(tmp_path / "part-0000000" / shards.DONE)
    write(tmp_path, 0, ["zz"])  # a slower writer of the same unit changes nothing
    assert mds.file_digest(tmp_path / "part-0000000" / shards.DONE) == before
    (tmp_path / ".aside-part-0000001-7").mkdir()
    (tmp_path / ".aside-index.json-7").write_text("half")
    shards.remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["part-0000000"]
    store.at(tmp_path).remove("part-0000000", shards.DONE)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("place", ["header", "first", "last"])
def test_one_changed_byte_is_found_at_the_read_of_its_sample(tmp_path: Path, place: str) -> None:
    root = complete(tmp_path / "set")
    path = root / "part-0000000" / "shard.00000.mds"
    whole = bytearray(path.read_bytes())
    with mds.Shard(path) as shard:
        at = {"header": 0, "first": int(shard.offsets[0]) + 9, "last": len(whole) - 1}[place]
    whole[at] ^= 1
    path.write_bytes(whole)
    with Samples(root, shards.read_table(root, "utterances.parquet"), FEATS) as samples:
        bad, identity = {"header": (0, "a"), "first": (0, "a"), "last": (1, "bb")}[place]
        with pytest.raises(UserError, match=rf"part-0000000/shard.00000.mds: the bytes of utterance '{identity}'"):
            samples[bad]
        assert samples[2]["id"] == "eee"


def test_a_file_that_was_mended_is_read_again(tmp_path: Path) -> None:
    root = complete(tmp_path / "set")
    path = root / "part-0000002" / "shard.00000.mds"
    with Samples(root, shards.read_table(root, "utterances.parquet"), FEATS) as samples:
        assert samples[2]["id"] == "eee"
        shutil.move(path, tmp_path / "kept")
        path.write_bytes(b"")
        os.replace(tmp_path / "kept", path)
        assert samples[2]["id"] == "eee"
        path.unlink()
        samples.close()
        with pytest.raises(UserError, match="'eee'"):
            samples[2]


@pytest.mark.parametrize(
    "change", [{"part": "../outside"}, {"part": "/etc"}, {"shard": "../../outside/shard.00000.mds"}]
)
def test_a_path_that_leaves_the_set_is_refused(tmp_path: Path, change: dict[str, str]) -> None:
    root = complete(tmp_path / "set")
    shutil.copytree(root / "part-0000000", tmp_path / "outside")
    rows: list[dict[str, Any]] = shards.read_table(root, "utterances.parquet").to_pylist()
    samples = Samples(root, pa.Table.from_pylist([{**rows[0], **change}]), FEATS)
    with pytest.raises(UserError, match="leaves the set's folder; do not use this set"):
        samples[0]


def test_a_link_out_of_the_set_is_refused(tmp_path: Path) -> None:
    root = complete(tmp_path / "set")
    os.replace(root / "part-0000000", tmp_path / "outside")
    (root / "part-0000000").symlink_to(tmp_path / "outside")
    samples = Samples(root, shards.read_table(root, "utterances.parquet"), FEATS)
    with pytest.raises(UserError, match="leaves the set's folder"):
        samples[0]


def open_shards(root: Path) -> int:
    """How many of a set's shard files this process holds open; other libraries open files of their own."""
    links = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return sum(link.suffix == ".mds" and link.is_relative_to(root) for link in links)


def test_open_files_stay_below_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sm_train.data.samples._OPEN_SHARDS", 1)
    root = complete(tmp_path / "set").resolve()
    with Samples(root, shards.read_table(root, "utterances.parquet"), FEATS) as samples:
        for row in (0, 2, 1, 2, 0):
            assert samples[row]["id"] == ["a", "bb", "eee"][row]
            assert open_shards(root) == 1
    assert open_shards(root) == 0


def test_what_a_submission_keeps_there_does_not_make_a_folder_another_s(tmp_path: Path) -> None:
    (tmp_path / "set/submitted/0001").mkdir(parents=True)
    shards.open_set(tmp_path / "set", {"layer": 1})
    assert shards.parts_of(tmp_path / "set") == []
