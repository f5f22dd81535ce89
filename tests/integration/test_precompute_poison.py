"""Utterances that end processes, over real Ray: they are quarantined, and no bit of the others changes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from sm_train.data import manifest as manifests
from sm_train.data import shards
from sm_train.precompute import PrecomputeConfig, in_this_process, make_encoder, run
from sm_train.records import Quarantined
from tests import builders
from tests.integration.precompute_jobs import command_file, hashes, log_of, parts, poisoned, start, wait_until

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
    driver = start("cluster.precompute", command_file(mine, tmp_path), f"out={out}", **poisoned())
    wait_until(lambda: parts(out) >= 3 or driver.poll() is not None)
    helpers = psutil.Process(driver.pid).children(recursive=True)
    _, err = driver.communicate(timeout=240)
    assert driver.returncode == 0, err
    assert "Traceback" not in err
    bad = pq.read_table(out / shards.QUARANTINE).to_pylist()
    assert {row["id"]: row["reason"] for row in bad} == REASONS
    (end,) = log_of(out, "end")
    assert (end["barred"], end["quarantined"]) == (1, {"crashes_encoder": 1, "crashes_decoder": 1})
    assert 5 <= end["deaths"] <= 9

    _, left = psutil.wait_procs(helpers, timeout=30)
    assert not left

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
