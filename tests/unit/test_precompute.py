"""The config of precompute; its runs are in tests/integration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sm_train import precompute
from sm_train.models.speech import EncoderConfig
from sm_train.precompute import PrecomputeConfig

CFG = PrecomputeConfig("m.parquet", "sets/mine", EncoderConfig(path="e"))


@pytest.mark.parametrize(
    ("log", "out", "file"),
    [
        ("auto", "sets/mine", Path("sets/mine/log.jsonl")),
        ("auto", "s3://bucket/mine", None),
        ("none", "sets/mine", None),
        ("logs/x.jsonl", "s3://bucket/mine", Path("logs/x.jsonl")),
    ],
)
def test_measurements_lie_in_a_local_sets_folder_unless_asked_otherwise(log: str, out: str, file: Path | None) -> None:
    assert precompute._log_file(replace(CFG, log=log, out=out)) == file


@pytest.mark.parametrize("name", ["unit_utterances", "batch_s", "threads", "actors", "decode_workers"])
def test_what_must_be_above_zero_is(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0"):
        replace(CFG, **{name: 0})
