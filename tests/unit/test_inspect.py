from __future__ import annotations

import json
import shutil
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from sm_train.data import audio, shards
from sm_train.data.lengths import num_positions
from sm_train.errors import UserError
from sm_train.records import Quarantined
from tests import builders
from tools.inspect import __main__ as inspect
from tools.inspect import bars, summary


def said(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    inspect.main([*map(str, argv)])
    return capsys.readouterr().out


def facts(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(said(capsys, *argv, "--json"))
    return found


def test_the_summary_adds_up(shard_set: Path, manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys, shard_set)
    rows = pq.read_table(manifest).to_pylist()
    assert (found["complete"], found["committed"], found["quarantined"]) == (True, 30, 0)
    assert found["hours"] == pytest.approx(sum(row["duration_s"] for row in rows) / 3600, rel=1e-3)
    for split in ("train", "dev"):
        mine = [row["duration_s"] for row in rows if row["split"] == split]
        assert found["hours_by_split"][split]["utterances"] == len(mine)
        assert found["hours_by_split"][split]["hours"] == pytest.approx(sum(mine) / 3600, rel=1e-3)
    assert list(found["hours_by_lang"]) == ["en"]
    shard_files = list(shard_set.glob("part-*/*.mds"))
    assert (found["parts"], found["shards"], found["speakers"]) == (4, len(shard_files), 1)
    assert found["bytes"] == sum(path.stat().st_size for path in shard_files)
    assert sum(found["duration_s"]["counts"]) == 30
    (target,) = found["targets"]
    table = pq.read_table(shard_set / "targets/tiny/tokens.parquet").to_pylist()
    frames = pq.read_table(shard_set / "utterances.parquet").column("num_frames").to_pylist()
    ratios = [row["num_tokens"] / num_positions(frames[row["utterance"]]) for row in table]
    assert (target["covered"], target["tokens"]) == (len(table), sum(row["num_tokens"] for row in table))
    assert target["tokens_per_position"]["most"] == pytest.approx(max(ratios))
    assert target["tokens_per_position"]["counts"] == np.histogram(ratios, [i / 10 for i in range(11)])[0].tolist()


def test_the_summary_says_what_the_set_is(shard_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, shard_set)
    assert f"{shard_set}: complete" in text
    for part in (
        "hidden_states[2] of", "the mean of every 2 frames", "25.0 frames a second of width 32, as float16",
        "in float32 on cpu, 1 thread(s); ", "30 utterances", "by split:", "targets/tiny: ", "tokens of a position",
    ):  # fmt: skip
        assert part in text


def test_no_shard_is_read_for_a_summary(shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(shard_set, tmp_path / "set", ignore=shutil.ignore_patterns("*.mds"))
    assert facts(capsys, tmp_path / "set")["committed"] == 30


def test_an_unfinished_set_is_shown_as_far_as_it_is(
    shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "set"
    shutil.copytree(shard_set, root)
    for name in ("dataset.json", "utterances.parquet", "part-0000001/_DONE.json"):
        (root / name).unlink()
    found = facts(capsys, root)
    assert (found["complete"], found["parts"], found["unfinished_parts"]) == (False, 3, 1)
    assert found["committed"] == 22
    assert found["contract"]["layer"] == 2
    assert "NOT complete" in said(capsys, root)
    assert "utt-000" in said(capsys, root, "--id", "utt-000")
    for part in root.glob("part-*"):
        shutil.rmtree(part)
    assert facts(capsys, root)["committed"] == 0
    assert "0 parts" in said(capsys, root)


def test_quarantine_is_counted_by_reason_with_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contract = {"schema": 2, "layer": 1}
    shards.open_set(tmp_path, contract)
    row = {"id": "a", "split": "train", "lang": "en", "speaker": "s", "duration_s": 1.0, "num_frames": 4}
    bad = [Quarantined(f"q{i}", "silent" if i < 5 else "too_long", f"detail {i}\x1b[31m") for i in range(6)]
    sample = {"id": "a", "feats": np.ones((4, 3), np.float16)}
    columns = {"id": "str", "feats": "ndarray:float16"}
    shards.write_part(tmp_path, "part-0000000", columns, [sample], [row], bad, {})
    shards.commit(tmp_path, ["part-0000000"], contract, "utterances.parquet")
    text = said(capsys, tmp_path)
    assert "quarantined as silent: 5\n  q0: detail 0\\x1b[31m\n" in text
    assert "quarantined as too_long: 1" in text
    assert "no target set" in text
    assert "q4" not in text
    assert "quarantined as silent: detail 4" in said(capsys, tmp_path, "--id", "q4")


def test_one_utterance_in_full(shard_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sm_train.data.target_set import TargetSet

    row = pq.read_table(shard_set / "utterances.parquet").to_pylist()[11]
    found = facts(capsys, shard_set, "--id", row["id"])
    assert found["row"] == row
    assert found["features"]["hash_ok"] is True
    assert found["features"]["shape"] == [row["num_frames"], 32]
    targets = TargetSet(shard_set, "tiny")
    at = targets.table.column("id").to_pylist().index(row["id"])
    assert found["targets"]["tiny"]["text"] == targets.text(targets.rows_of(at))
    text = said(capsys, shard_set, "--id", row["id"])
    assert "hash         ok" in text
    assert row["text"] in text


def test_a_damaged_sample_is_shown_as_such(shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(shard_set, tmp_path / "set")
    path = tmp_path / "set/part-0000000/shard.00000.mds"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    assert "NOT OK" in said(capsys, tmp_path / "set", "--id", "utt-007")
    path.write_bytes(data[:-9])
    with pytest.raises(UserError, match=r"part-0000000/shard.00000.mds: sample 7 cannot be read"):
        inspect.main([str(tmp_path / "set"), "--id", "utt-007"])


def test_some_utterances_as_sound(
    shard_set: Path, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [shard_set, "--listen", 4, "--seed", 3, "--audio-root", manifest.parent, "--to"]
    lines = said(capsys, *argv, tmp_path / "a").splitlines()
    said(capsys, *argv, tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert len(names) == 8
    assert len(lines) == 4
    rows = {row["ordinal"]: row for row in pq.read_table(shard_set / "utterances.parquet").to_pylist()}
    for path in (tmp_path / "a").glob("*.wav"):
        row = rows[int(path.stem)]
        with wave.open(str(path)) as file:
            assert (file.getframerate(), file.getnchannels()) == (16_000, 1)
            written = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767
        np.testing.assert_allclose(written, audio.load(manifest.parent / row["audio"]), atol=1e-4)
        assert path.with_suffix(".txt").read_text() == row["text"] + "\n"
    with pytest.raises(UserError, match="none of 4 audio files can be read"):
        inspect.main([*map(str, argv[:-2]), str(tmp_path / "nowhere"), "--to", str(tmp_path / "c")])


def test_bins_read_well_and_hold_all() -> None:
    rng = np.random.default_rng(0)
    for most in (0.04, 0.9, 1.0, 5.0, 34.9, 60.0, 3599.0):
        values = rng.uniform(0, most, size=100)
        values[0] = most
        edges = summary._edges(values)
        assert 3 <= len(edges) <= 14
        assert edges[0] == 0
        assert edges[-1] > most
        assert sum(summary._spread(values, edges)["counts"]) == 100
        assert len(set(bars([1] * (len(edges) - 1), edges, " s"))) == len(edges) - 1
    assert bars([0, 3], [0.0, 1.0, 2.0], " s", width=6)[1].endswith(" 3  ######")


def test_what_is_not_there_is_named(shard_set: Path, tmp_path: Path) -> None:
    for argv, text in (
        ([str(tmp_path)], "is no shard set"),
        ([str(shard_set), "--id", "nobody"], "has no utterance 'nobody'"),
        ([str(shard_set), "--targets", "none"], "has no target set 'none'; it has: tiny"),
        ([str(shard_set), "--listen", "2"], "give --to and --audio-root"),
        (["s3://bucket/set"], "name it with --targets"),
    ):
        with pytest.raises(UserError, match=text):
            inspect.main(argv)


def test_a_remote_set_is_read_through_a_cache(shard_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys, f"file://{shard_set}", "--targets", "tiny")
    assert (found["committed"], found["targets"][0]["covered"] > 0) == (30, True)
    assert facts(capsys, f"file://{shard_set}", "--targets", "tiny", "--id", "utt-003")["features"]["hash_ok"]


def test_the_command_runs_beside_the_standard_librarys_inspect(shard_set: Path) -> None:
    done = builders.run_module("tools.inspect", shard_set)
    assert done.returncode == 0, done.stderr
    assert "30 utterances" in done.stdout
    done = builders.run_module("tools.verify", shard_set / "absent")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
