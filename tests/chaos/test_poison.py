"""Thousands of utterances, one in a hundred bad in one of eight ways: exactly those are quarantined, and what it costs.

The miniature's corpus of ``make demo`` is used; without one it is made first.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from sm_train.data import shards
from sm_train.models.speech import EncoderConfig
from sm_train.precompute import PrecomputeConfig
from tests import builders
from tests.integration.precompute_jobs import command_file, log_of, poisoned, start

pytestmark = pytest.mark.chaos

DEMO = builders.ROOT / "runs/demo/corpus/manifest.parquet"
UTTERANCES, SHARE = 4000, 0.01
ENCODER = builders.ROOT / "tools/miniature/weights/encoder"


def _cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _as_wav(samples: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        audio_S, rate_hz = soundfile.read(path, dtype="float32")
        soundfile.write(path, samples(audio_S), rate_hz, format="WAV", subtype="FLOAT")

    return spoil


def _nan(audio_S: np.ndarray) -> np.ndarray:
    audio_S[len(audio_S) // 2] = np.nan
    return audio_S


KINDS: dict[str, Callable[[Path], object]] = {
    "missing_audio": lambda path: path.unlink(),
    "undecodable": lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)),
    "truncated": lambda path: (_as_wav(lambda audio_S: audio_S)(path), _cut_short(path)),
    "empty_audio": _as_wav(lambda audio_S: audio_S[:0]),
    "silent": _as_wav(np.zeros_like),
    "non_finite": _as_wav(_nan),
    "crashes_decoder": lambda path: path,
    "crashes_encoder": lambda path: path,
}
_NAMES = {"crashes_decoder": "segfault", "crashes_encoder": "killer"}


def corpus(folder: Path) -> list[dict[str, Any]]:
    """The rows of UTTERANCES utterances of the miniature, whose audio is copied here."""
    source = DEMO
    if not source.exists():
        source = folder / "made/manifest.parquet"
        builders.run_module(
            "tools.miniature.corpus", "configs/miniature/easy.yaml", f"out={source.parent}", timeout_s=900
        )
    rows = pq.read_table(source).to_pylist()[:UTTERANCES]
    for row in rows:
        path = folder / "audio" / f"{row['id']}.audio"
        path.parent.mkdir(exist_ok=True)
        shutil.copy(source.parent / row["audio"], path)
        row["audio"] = str(path)
    return rows


def run(cfg: PrecomputeConfig, folder: Path) -> tuple[float, dict[str, Any]]:
    """Seconds of the whole command, and the last line of its log."""
    folder.mkdir()
    begun = time.perf_counter()
    driver = start("cluster.precompute", command_file(cfg, folder), **poisoned())
    try:
        _, err = driver.communicate(timeout=900)
    except subprocess.TimeoutExpired:
        driver.kill()
        raise
    assert driver.returncode == 0, err
    return time.perf_counter() - begun, log_of(Path(cfg.out), "end")[-1]


@pytest.mark.parametrize("killers_of_encoders", [0, 1])
def test_one_in_a_hundred_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killers_of_encoders: int) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    rows = corpus(tmp_path)
    rng = np.random.default_rng(7)
    chosen = rng.choice(len(rows), size=round(SHARE * len(rows)), replace=False).tolist()
    others = [kind for kind in KINDS if kind != "crashes_encoder"]
    reasons = ["crashes_encoder"] * killers_of_encoders
    reasons += [others[i % len(others)] for i in range(len(chosen) - len(reasons))]

    def job(name: str) -> PrecomputeConfig:
        manifest = builders.write_manifest(tmp_path / f"{name}.parquet", rows)
        frozen = EncoderConfig(path=str(ENCODER), layer=4, device="cpu")
        settings: dict[str, Any] = {"unit_utterances": 128, "batch_s": 60.0, "max_quarantined_share": 0.05}
        return PrecomputeConfig(str(manifest), str(tmp_path / name / "set"), frozen, **settings)

    clean_s, clean = run(job("clean"), tmp_path / "clean")
    expected = {}
    for i, reason in zip(chosen, reasons, strict=True):
        path = Path(rows[i]["audio"])
        if name := _NAMES.get(reason):
            path = path.rename(path.with_name(f"{name}-{path.name}"))
        KINDS[reason](path)
        rows[i]["audio"], expected[rows[i]["id"]] = str(path), reason
    bad_s, bad = run(job("bad"), tmp_path / "bad")

    root = tmp_path / "bad/set"
    found = {row["id"]: row["reason"] for row in pq.read_table(root / shards.QUARANTINE).to_pylist()}
    assert found == expected
    hashes = [
        {row["id"]: row["xxh3"] for row in shards.read_table(at, "utterances.parquet").to_pylist()}
        for at in (tmp_path / "clean/set", root)
    ]
    assert hashes[1] == {i: h for i, h in hashes[0].items() if i not in expected}
    counts = {reason: list(expected.values()).count(reason) for reason in KINDS if reason in expected.values()}
    print(f"\n{len(rows)} utterances, {json.dumps(counts)}; deaths of encoders {bad['deaths']}, probes {bad['probes']}")
    print(f"whole command {clean_s:.1f} s clean, {bad_s:.1f} s with them: {100 * (bad_s / clean_s - 1):+.1f}%")
    lost = bad["wall_s"] / clean["wall_s"] - 1
    print(f"encoding {clean['wall_s']:.1f} s clean, {bad['wall_s']:.1f} s with them: {100 * lost:+.1f}%")
