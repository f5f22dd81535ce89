"""Memory, lanes, and a batch that is really run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cluster.doctor import trial
from cluster.doctor.findings import FAIL, OK, SKIP, WARN
from cluster.doctor.work import Work
from cluster.submission import SCHEMAS, SubmitConfig
from sm_train import config
from sm_train.models.mapper import Layer
from tests import training
from tests.builders import ROOT
from tests.unit.test_need import write

LLAMA = ROOT / "configs/tune/llama31-8b.yaml"


def work(stage: str, path: Path, *words: str, **submit: object) -> Work:
    cfg = config.load(SCHEMAS[stage], [str(path), *words], "test")
    return Work(stage, cfg, config.from_mapping(SubmitConfig, submit, "test"))


def test_lanes_and_ranks(tmp_path: Path) -> None:
    path = training.write_config(tmp_path / "run.yaml", tmp_path)
    assert trial.lanes(work("pretrain", path, nodes=2, ranks_per_node=2)).mark == OK
    bad = trial.lanes(work("pretrain", path, nodes=3))
    assert (bad.mark, bad.remedy) == (FAIL, "ask for 1, 2, 4 ranks, or other lanes")


def test_devices_and_precisions(tmp_path: Path) -> None:
    path = training.write_config(tmp_path / "run.yaml", tmp_path)
    assert trial.device(work("pretrain", path)).mark == OK
    assert trial.device(work("pretrain", path, "engine.precision=fp16", "engine.name=deepspeed")).mark == FAIL
    on_gpu = ["engine.device=cuda", "engine.precision=bf16"]
    where = {"ranks_per_node": 4, "gpus_per_node": 4}
    if not torch.cuda.is_available():
        assert trial.device(work("pretrain", path, *on_gpu, **where)).mark == FAIL
        assert trial.device(work("pretrain", path, *on_gpu, **where, to="slurm")).mark == WARN
    old = trial.device(work("pretrain", path, "engine.device=auto", "engine.precision=bf16", gpu="V100-32"))
    assert (old.mark, "fp16" in old.remedy) == (WARN, True)
    local = trial.device(work("pretrain", path, "engine.device=auto", "engine.precision=fp16", **where, gpu="A100-80"))
    assert (local.mark, "does not scale" in local.text) == (FAIL, True)
    zero3 = work("tune", LLAMA, "engine.device=auto", "engine.precision=fp16", **where, gpu="A100-80")
    assert trial.device(zero3).mark == OK  # stage 2 takes deepspeed for it


def test_an_llm_of_8b_on_v100s(tmp_path: Path) -> None:
    words = [f"llm={write(tmp_path)}", "placement=replicated", "engine.precision=fp32"]
    where = {"ranks_per_node": 4, "gpus_per_node": 4, "gpu": "V100-32"}
    (found,) = trial.fit(work("tune", LLAMA, *words, **where))
    assert found.mark == FAIL
    assert "llm_weights 29.9" in found.text
    assert "placement=zero3" in found.remedy
    assert [one.mark for one in trial.fit(work("tune", LLAMA, *words[:1], **{**where, "gpu": "H100-80"}))] == [OK]
    assert [one.mark for one in trial.fit(work("tune", LLAMA, "llm=no/such-llm", **where))] == [WARN]
    if not torch.cuda.is_available():
        assert [one.mark for one in trial.fit(work("tune", LLAMA, *words[:1]))] == [WARN]  # cuda, and none is here


def test_ranks_on_this_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = training.write_config(tmp_path / "run.yaml", tmp_path)
    assert [one.mark for one in trial.fit(work("pretrain", path))] == [OK]
    monkeypatch.setattr(trial, "host_bytes", lambda: (3e8, 1e8))
    assert [one.mark for one in trial.fit(work("pretrain", path))] == [FAIL]


def test_a_batch_forward_and_backward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = training.write_config(tmp_path / "run.yaml", tmp_path)
    (found,) = trial.trial(work("pretrain", path))
    assert (found.mark, "gradient norm" in found.text) == (OK, True)
    monkeypatch.setattr(Layer, "_feed_forward", lambda self, x_BTD: x_BTD * float("nan"))  # a device that miscounts
    assert [one.mark for one in trial.trial(work("pretrain", path))] == [FAIL]
    monkeypatch.setattr(trial, "host_bytes", lambda: (1e4, 1e4))
    assert [one.mark for one in trial.trial(work("pretrain", path))] == [SKIP]


def test_the_llm_s_gradient_reaches_the_mapper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = training.shard_set(tmp_path / "set")
    shape = {"mapper": config.to_mapping(work("pretrain", training.write_config(tmp_path / "r.yaml", root)).cfg.mapper)}
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1/mapper.safetensors").touch()
    (tmp_path / "stage1/config.json").write_text(json.dumps({**shape, "output_width": 160}))
    llm = ROOT / "tools/miniature/weights/llm"
    words = [f"mapper={tmp_path / 'stage1'}", f"llm={llm}", "engine.device=cpu", "engine.precision=fp32"]
    mapper, llm_found = trial.trial(work("tune", LLAMA, *words))
    assert (mapper.mark, llm_found.mark) == (OK, OK)
    assert str(llm) in llm_found.text
    monkeypatch.setattr(trial, "_LARGEST", 1000)
    assert [one.mark for one in trial.trial(work("tune", LLAMA, *words))] == [OK, SKIP]
    assert [one.mark for one in trial.trial(work("tune", LLAMA, *words[1:]))] == [SKIP]  # no mapper yet


def test_an_encoder_and_an_evaluation_s_llm(encoder_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "precompute.yaml"
    path.write_text(f"{{manifest: m, out: o, encoder: {{path: {encoder_folder}, layer: 2}}}}")
    assert trial.encoder_trial(work("precompute", path)).mark == OK
    assert trial.encoder_trial(work("precompute", path, "encoder.path=no/such-encoder")).mark == SKIP
    miniature = ROOT / "configs/evaluate/miniature.yaml"
    assert trial.answer_trial(work("evaluate", miniature)).mark == OK
    assert trial.answer_trial(work("evaluate", miniature, "llm.path=no/such-llm")).mark == SKIP


def test_an_evaluation_s_llm_and_its_device(tmp_path: Path) -> None:
    path = ROOT / "configs/evaluate/llama31-8b.yaml"
    words = [f"llm.path={write(tmp_path)}"]
    assert trial.fit_answers(work("evaluate", path, *words, gpu="A100-40")).mark == OK
    bad = trial.fit_answers(work("evaluate", path, *words, "llm.dtype=float32", gpu="V100-32"))
    assert (bad.mark, "llm_weights 29.9" in bad.text) == (FAIL, True)
    assert trial.fit_answers(work("evaluate", path, "llm.path=no/such-llm")).mark == WARN
