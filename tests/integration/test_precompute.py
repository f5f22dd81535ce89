"""Precompute as a whole: finished jobs, a corpus where everything is wrong, and mistakes on the command line."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from sm_train.data import shards
from sm_train.errors import UserError
from sm_train.precompute import UNITS_AHEAD, PrecomputeConfig, in_this_process, run
from tests import builders
from tests.integration.precompute_jobs import NUM_PARTS, command_file, hashes, parts, run_killed, start

# --- finished ------------------------------------------------------------------------------------------------------


def test_a_finished_job_is_not_done_again(cfg: PrecomputeConfig, reference: dict[str, str], tmp_path: Path) -> None:
    out, file = tmp_path / "set", command_file(cfg, tmp_path)
    run(replace(cfg, out=str(out)), in_this_process)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "cluster.precompute", str(file), f"out={out}"],
        cwd=builders.ROOT, env=builders.child_env(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "complete, 30 utterances" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "torch" in imported
    assert not imported & {"transformers", "ray", "streaming"}
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert hashes(out) == reference


def test_a_finished_set_of_another_contract_is_named(cfg: PrecomputeConfig, tmp_path: Path) -> None:
    mine = replace(cfg, out=str(tmp_path / "set"), targets=[])
    run(mine, in_this_process)
    other = replace(mine, encoder=replace(mine.encoder, layer=1))
    with pytest.raises(UserError, match="layer is 2 there, but 1 is asked for; give another out folder"):
        run(other, in_this_process)
    fewer = builders.write_manifest(tmp_path / "fewer.parquet", pq.read_table(cfg.manifest).to_pylist()[:-1])
    with pytest.raises(UserError, match="manifest_hash"):
        run(replace(mine, manifest=str(fewer)), in_this_process)


# --- a corpus where everything is wrong -------------------------------------------------------------------------------


@pytest.fixture
def bad_corpus(manifest: Path, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A copy of the corpus with one utterance of each kind of trouble, and the reason that each must get.

    ``durations.parquet`` beside its manifest has no trouble but two odd durations, since batches follow from durations.
    """
    folder = tmp_path / "corpus"
    shutil.copytree(manifest.parent, folder)
    rows = pq.read_table(folder / "manifest.parquet").to_pylist()
    rng = np.random.default_rng(3)
    rows[14]["duration_s"], rows[25]["duration_s"] = 0.1, 11.0
    builders.write_manifest(folder / "durations.parquet", rows)

    def spoil(i: int, name: str, samples: np.ndarray | None = None, raw: bytes | None = None) -> None:
        rows[i]["audio"] = f"audio/{name}"
        if samples is not None:
            soundfile.write(
                folder / "audio" / name, samples, 16_000, subtype="FLOAT" if name.endswith(".wav") else None
            )
        elif raw is not None:
            (folder / "audio" / name).write_bytes(raw)

    flac = (folder / rows[3]["audio"]).read_bytes()
    long_S = builders.tones(rng, rows[9]["duration_s"])
    spoil(1, "absent.flac")
    rows[2]["text"] = "  "
    spoil(3, "cut.flac", raw=flac[: len(flac) * 2 // 3])
    spoil(5, "silent.flac", np.zeros(48_000))
    spoil(9, "nan.wav", np.where(np.arange(len(long_S)) == 777, np.nan, long_S))
    spoil(12, "garbage.flac", raw=rng.bytes(20_000))
    spoil(14, "short.wav", builders.tones(rng, 0.1))
    spoil(20, "lost_its_end.wav", builders.tones(rng, 0.5))
    reasons = {1: "missing_audio", 2: "empty_text", 3: "undecodable", 5: "silent", 9: "non_finite", 12: "undecodable",
               14: "too_short", 20: "truncated", 25: "too_long"}  # fmt: skip
    builders.write_manifest(folder / "manifest.parquet", rows)
    return folder, {rows[i]["id"]: reason for i, reason in reasons.items()}


def test_each_bad_utterance_is_quarantined_and_no_other_changes_a_bit(
    cfg: PrecomputeConfig, bad_corpus: tuple[Path, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, reasons = bad_corpus
    out = tmp_path / "set"
    mine = replace(cfg, max_duration_s=10.0, max_quarantined_share=0.5, targets=[])
    run(replace(mine, manifest=str(folder / "manifest.parquet"), out=str(out)), in_this_process)
    bad = {row["id"]: row["reason"] for row in pq.read_table(out / "quarantine.parquet").to_pylist()}
    assert bad == reasons
    assert "9 of 30 utterances quarantined" in capsys.readouterr().out
    found = shards.read_table(out, "utterances.parquet").to_pylist()
    inputs = [row["id"] for row in pq.read_table(cfg.manifest).to_pylist()]
    assert [row["id"] for row in found] == [i for i in inputs if i not in bad]
    run(replace(mine, manifest=str(folder / "durations.parquet"), out=str(tmp_path / "clean")), in_this_process)
    clean = shards.read_table(tmp_path / "clean", "utterances.parquet").to_pylist()
    assert len(clean) == 28
    assert {(row["id"], row["xxh3"]) for row in found} <= {(row["id"], row["xxh3"]) for row in clean}


def test_a_run_above_the_share_stops_at_once_and_goes_on_when_the_corpus_is_mended(
    cfg: PrecomputeConfig, manifest: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "corpus"
    shutil.copytree(manifest.parent, folder)
    os.rename(folder / "audio/004.flac", folder / "away")
    out = tmp_path / "set"
    mine = replace(cfg, manifest=str(folder / "manifest.parquet"), out=str(out), targets=[])
    file = command_file(mine, tmp_path)
    done = builders.run_module("sm_train.precompute", file)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("precompute:")]
    assert line.startswith(
        "error: 1 of 30 utterances are quarantined (1 missing_audio), above max_quarantined_share 0.01"
    )
    assert "'utt-004'" in line
    assert 3 <= parts(out) <= 3 + UNITS_AHEAD  # those at hand are still committed
    with pytest.raises(UserError, match="1 of 30 utterances are quarantined"):
        run(mine, lambda cfg, units: pytest.fail("it is certain already"))
    with pytest.raises(UserError, match="layer is 2 there, but 1 is asked for"):
        run(replace(mine, requeue=True, encoder=replace(mine.encoder, layer=1)), in_this_process)
    assert not list(out.glob("requeue*"))
    os.rename(folder / "away", folder / "audio/004.flac")
    run(replace(mine, requeue=True), in_this_process)
    assert parts(out) == NUM_PARTS + 1
    assert pq.read_table(out / shards.QUARANTINE).num_rows == 0
    found = shards.read_table(out, "utterances.parquet").to_pylist()
    assert {row["id"]: row["part"] for row in found}["utt-004"] == f"part-{NUM_PARTS:07d}"
    assert len(found) == 30


# --- mended and run again ------------------------------------------------------------------------------------------


def test_what_is_mended_is_appended_and_what_fails_again_is_counted(
    cfg: PrecomputeConfig, spoilt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = replace(cfg, manifest=str(spoilt), out=str(tmp_path / "set"), targets=[], max_quarantined_share=0.2)
    out = tmp_path / "set"

    def bad() -> dict[str, int]:
        return {row["id"]: row["attempts"] for row in pq.read_table(out / shards.QUARANTINE).to_pylist()}

    run(mine, in_this_process)
    assert bad() == {"utt-003": 1, "utt-011": 1, "utt-012": 1, "utt-029": 1}
    before = {name: h for name, h in hashes(out).items() if name.startswith("part-")}
    mend(spoilt, 3, 12, 29)
    run(replace(mine, requeue=True), in_this_process)
    assert bad() == {"utt-011": 2}
    assert before.items() <= hashes(out).items()
    found = shards.read_table(out, "utterances.parquet").to_pylist()
    assert [row["id"] for row in found[-3:]] == ["utt-003", "utt-012", "utt-029"]
    assert [row["ordinal"] for row in found] == list(range(29))
    after = hashes(out)
    capsys.readouterr()
    run(mine, lambda cfg, units: pytest.fail("nothing is to be done"))
    assert "complete, 30 utterances" in capsys.readouterr().out
    assert hashes(out) == after

    run(replace(mine, requeue=True), in_this_process)
    assert bad() == {"utt-011": 3}
    mend(spoilt, 11)
    run(replace(mine, requeue=True), in_this_process)
    assert bad() == {}
    assert len(shards.read_table(out, "utterances.parquet")) == 30
    run(replace(mine, requeue=True), lambda cfg, units: pytest.fail("nothing is quarantined"))


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_a_killed_round_is_finished_by_whichever_run_comes_next(
    cfg: PrecomputeConfig, spoilt: Path, tmp_path: Path, seed: int
) -> None:
    mine = replace(cfg, manifest=str(spoilt), out=str(tmp_path / "set"), targets=[], max_quarantined_share=0.2)
    run(mine, in_this_process)
    shutil.copytree(tmp_path / "set", tmp_path / "undisturbed")
    mend(spoilt, 3, 12)
    run(replace(mine, out=str(tmp_path / "undisturbed"), requeue=True), in_this_process)
    wanted, rng, kills = hashes(tmp_path / "undisturbed"), random.Random(seed), 0
    assert run_killed(replace(mine, requeue=True), at_call=rng.randint(1, 34))
    begun = (tmp_path / "set/requeue-0001.json").exists()
    while run_killed(replace(mine, requeue=not begun or rng.random() < 0.5), at_call=rng.randint(4, 34)):
        kills += 1
        begun = (tmp_path / "set/requeue-0001.json").exists()
        if kills == 4:
            run(replace(mine, requeue=not begun), in_this_process)
            break
    assert hashes(tmp_path / "set") == wanted


@pytest.fixture
def spoilt(manifest: Path, tmp_path: Path) -> Path:
    """The manifest of a copy of the corpus that lacks four files."""
    folder = tmp_path / "corpus"
    shutil.copytree(manifest.parent, folder)
    for i in (3, 11, 12, 29):
        (folder / f"audio/{i:03d}.flac").rename(folder / f"audio/{i:03d}.away")
    return folder / "manifest.parquet"


def mend(manifest: Path, *numbers: int) -> None:
    for i in numbers:
        (manifest.parent / f"audio/{i:03d}.away").rename(manifest.parent / f"audio/{i:03d}.flac")


# --- mistakes ------------------------------------------------------------------------------------------------------


def test_each_mistake_is_one_line_and_exit_code_2(cfg: PrecomputeConfig, manifest: Path, tmp_path: Path) -> None:
    file = command_file(cfg, tmp_path)
    rows = pq.read_table(manifest).to_pylist()
    twice = builders.write_manifest(tmp_path / "twice.jsonl", [*rows, rows[4]])
    cases = {
        f"manifest={twice}": "id 'utt-004' stands in row 5 and in row 31",
        f"manifest={tmp_path / 'absent.parquet'}": "absent.parquet does not exist",
        "encoder.layers=3": "unknown key 'encoder.layers'",
        "encoder.layer=7": "has hidden_states[0] to [3]; layer is 7",
        f"out={manifest.parent}": "is not empty and holds no shard set",
    }
    commands = [start("sm_train.precompute", file, f"out={tmp_path / 'set'}", change) for change in cases]
    for command, says in zip(commands, cases.values(), strict=True):
        out, err = command.communicate(timeout=60)
        assert (command.returncode, out) == (2, "")
        assert err.startswith("error: ")
        assert says in err
        assert err.count("\n") == 1
    assert parts(tmp_path / "set") == 0
