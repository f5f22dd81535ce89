"""What a config names, whole and damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cluster.doctor.findings import FAIL, OK, SKIP, WARN, Finding, carry_out
from cluster.doctor.inputs import checks
from cluster.doctor.work import Work
from cluster.submission import SCHEMAS, SubmitConfig
from sm_train import config
from tests import builders, training
from tests.builders import ROOT

PROMPTS = ROOT / "configs/prompts/miniature.yaml"


def found(stage: str, path: Path, *words: str) -> dict[str, list[Finding]]:
    """The findings about a stage's inputs, by the names of their checks."""
    work = Work(stage, config.load(SCHEMAS[stage], [str(path), *words], "test"), SubmitConfig())
    by_name: dict[str, list[Finding]] = {}
    for check in checks(work):
        by_name.setdefault(check.name, []).extend(carry_out(check))
    return by_name


def marks(findings: list[Finding]) -> list[str]:
    return [finding.mark for finding in findings]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return training.shard_set(tmp_path / "set")


def test_a_set_that_is_whole(root: Path, tmp_path: Path) -> None:
    shards = found("pretrain", training.write_config(tmp_path / "run.yaml", root))["shards"]
    assert marks(shards) == [OK, OK]
    assert "52 utterances" in shards[1].text
    assert "8 of valid" in shards[1].text


@pytest.mark.parametrize(
    ("words", "says"),
    [(["target=other"], "no complete target set 'other'"), (["splits=[dev]"], "no utterance in split 'dev'"),
     (["mapper.widths=[32,16,32]"], "the features are 16 wide"), (["batch.frames=10"], "frames"),
     (["batch.lanes=60"], "lanes"), (["shards=s3://bucket/set"], "nothing says where to keep it")],
)  # fmt: skip
def test_a_config_that_does_not_suit_its_set(words: list[str], says: str, root: Path, tmp_path: Path) -> None:
    last = found("pretrain", training.write_config(tmp_path / "run.yaml", root), *words)["shards"][-1]
    assert (last.mark, says in last.text) == (FAIL, True), last
    assert last.remedy


def test_a_part_that_is_gone(root: Path, tmp_path: Path) -> None:
    (root / "part-0000000/_DONE.json").unlink()
    first = found("pretrain", training.write_config(tmp_path / "run.yaml", root))["shards"][0]
    assert (first.mark, "1 of 1 parts are gone" in first.text) == (FAIL, True)


def test_a_remote_set_with_a_cache_is_left_to_the_run(tmp_path: Path) -> None:
    path = training.write_config(tmp_path / "run.yaml", Path("set"))
    words = ("shards=s3://bucket/set", f"loader.cache={tmp_path}")
    assert marks(found("pretrain", path, *words)["shards"]) == [SKIP]


def test_precompute(manifest: Path, encoder_folder: Path, llm_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "precompute.yaml"
    values: dict[str, Any] = {"manifest": str(manifest), "out": str(tmp_path / "set"),
                              "encoder": {"path": str(encoder_folder), "layer": 2},
                              "targets": [{"name": "tiny", "llm": str(llm_folder)}]}  # fmt: skip
    path.write_text(json.dumps(values))
    good = found("precompute", path)
    assert {name: marks(each) for name, each in good.items()} == {"manifest": [OK], "encoder": [OK], "llm": [OK]}
    assert "30 utterances" in good["manifest"][0].text
    bad = found("precompute", path, f"encoder.path={tmp_path / 'none'}", f"manifest={tmp_path / 'none.parquet'}")
    assert (marks(bad["encoder"]), marks(bad["manifest"])) == ([FAIL], [FAIL])
    rows = [builders.row("a", "gone.flac", 1.0, "the boat")]
    lost = found("precompute", path, f"manifest={builders.write_manifest(tmp_path / 'm.jsonl', rows)}")["manifest"][0]
    assert (lost.mark, "gone.flac does not exist" in lost.text) == (FAIL, True)


def test_tune(root: Path, llm_folder: Path, tmp_path: Path) -> None:
    stage1 = training.write_config(tmp_path / "stage1.yaml", root)
    training.train(stage1, "loop.steps=1", "valid_splits=[]")
    path = tmp_path / "tune.yaml"
    words = {"run": tmp_path / "stage2", "mapper": tmp_path / "stage1", "shards": root, "target": training.TARGET,
             "tasks": "{asr: 1}", "prompts": PROMPTS, "llm": llm_folder}  # fmt: skip
    path.write_text("\n".join(f"{name}: {value}" for name, value in words.items()))
    of = found("tune", path)
    assert (marks(of["mapper"]), marks(of["llm"])) == ([OK], [OK])
    assert marks(of["prompts"]) == [FAIL]  # the target set has no tasks yet
    assert "cluster.retarget" in of["prompts"][0].remedy
    (root / "targets" / training.TARGET / "tasks.parquet").touch()
    assert marks(found("tune", path)["prompts"]) == [OK]
    shutil.rmtree(tmp_path / "stage1/checkpoints")
    bad = found("tune", path, "llm=no/such-llm", f"prompts={tmp_path / 'none.yaml'}")
    assert [marks(bad[name]) for name in ("mapper", "llm", "prompts")] == [[FAIL]] * 3
    assert "HF_HUB_OFFLINE" in bad["llm"][0].text


def test_evaluate(root: Path, tmp_path: Path) -> None:
    instructions = tmp_path / "asr.jsonl"
    instructions.write_text('{"utterance_id": "utt-001", "task": "asr", "answer": "red"}\n')
    llm = ROOT / "tools/miniature/weights/llm"
    cascade = ROOT / "tools/miniature/weights/encoder"
    path = tmp_path / "evaluate.yaml"
    path.write_text(
        f"{{run: {tmp_path / 'none'}, shards: {root}, target: {training.TARGET}, splits: [valid], prompts: {PROMPTS}, "
        f"instructions: {instructions}, llm: {{path: {llm}}}, cascade: {cascade}}}"
    )
    of = found("evaluate", path)
    assert [marks(of[name]) for name in ("shards", "mapper", "questions", "llm", "cascade")] == [
        [OK, OK], [FAIL], [OK], [OK], [OK],
    ]  # fmt: skip
    bad = found("evaluate", path, f"cascade={tmp_path}", f"lexicon={tmp_path / 'none'}")
    assert (marks(bad["cascade"]), marks(bad["questions"])) == ([FAIL], [FAIL])
    assert marks(found("evaluate", path, f"audio_root={tmp_path / 'none'}")["questions"]) == [WARN]
