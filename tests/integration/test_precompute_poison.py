"""Utterances that end processes, among healthy ones, over real Ray: those are quarantined and no other changes a bit."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sm_train.data import manifest as manifests
from sm_train.data import shards
from sm_train.precompute import PrecomputeConfig, in_this_process, make_encoder, run
from sm_train.records import Quarantined
from tests import builders
from tests.integration.precompute_jobs import command_file, hashes, log_of, poisoned

pytestmark = pytest.mark.slow

KILLERS = {5: "killer", 22: "segfault"}
REASONS = {"utt-005": "crashes_encoder", "utt-022": "crashes_decoder"}


@pytest.fixture
def corpus(manifest: Path, tmp_path: Path) -> Path:
    """The corpus with two files that end processes where tests/poison is on the path; elsewhere they are healthy."""
    folder = tmp_path / "corpus"
    shutil.copytree(manifest.parent, folder)
    rows = pq.read_table(manifest).to_pylist()
    for i, name in KILLERS.items():
        shutil.copy(folder / rows[i]["audio"], folder / f"audio/{name}.flac")
        rows[i]["audio"] = f"audio/{name}.flac"
    return builders.write_manifest(folder / "manifest.parquet", rows)


def test_exactly_those_that_end_processes_are_quarantined_and_neighbours_keep_their_bytes(
    cfg: PrecomputeConfig, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    out = tmp_path / "set"
    mine = replace(cfg, manifest=str(corpus), targets=[], unit_utterances=4, batch_s=8.0, max_quarantined_share=0.1)
    done = builders.run_module(
        "cluster.precompute", command_file(mine, tmp_path), f"out={out}", timeout_s=240, **poisoned()
    )
    assert done.returncode == 0, done.stderr
    bad = pq.read_table(out / shards.QUARANTINE).to_pylist()
    assert {row["id"]: row["reason"] for row in bad} == REASONS
    (end,) = log_of(out, "end")
    assert (end["barred"], end["quarantined"]) == (1, {"crashes_encoder": 1, "crashes_decoder": 1})
    assert 5 <= end["deaths"] <= 9

    # With healthy data in their places, the others' features are the same bits.
    healthy = replace(mine, out=str(tmp_path / "healthy"))
    run(healthy, in_this_process)
    features = {
        row["id"]: row["xxh3"] for row in shards.read_table(tmp_path / "healthy", "utterances.parquet").to_pylist()
    }
    assert len(features) == 30
    found = {row["id"]: row["xxh3"] for row in shards.read_table(out, "utterances.parquet").to_pylist()}
    assert found == {i: h for i, h in features.items() if i not in REASONS}

    # Barred from the start, the unit becomes the same bytes.
    encoder = make_encoder(replace(mine, out=str(tmp_path / "barred")))
    unit = manifests.cut_units(manifests.read_manifest(corpus), 4)[1]
    encoder.encode_unit(replace(unit, barred=tuple(Quarantined(**row) for row in bad if row["id"] == "utt-005")))
    encoder.close()
    assert hashes(tmp_path / "barred" / unit.part) == hashes(out / unit.part)


def test_the_run_stops_as_soon_as_too_many_are_barred(
    cfg: PrecomputeConfig, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    out = tmp_path / "set"
    mine = replace(cfg, manifest=str(corpus), targets=[], unit_utterances=15, batch_s=30.0, max_quarantined_share=0.0)
    rows = [{**row, "audio": "audio/killer.flac"} for row in pq.read_table(corpus).to_pylist()[:15]]
    killing = builders.write_manifest(corpus.parent / "killing.parquet", rows)
    file = command_file(replace(mine, manifest=str(killing), actors=1), tmp_path)
    done = builders.run_module("cluster.precompute", file, f"out={out}", timeout_s=240, **poisoned())
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: 1 of 15 utterances are quarantined (1 crashes_encoder), above")
    assert log_of(out, "end")[0]["barred"] == 1
