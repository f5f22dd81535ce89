"""A run of an untrained mapper on the shared shard set, and what its export is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sm_train import files
from sm_train.chat import Chat
from sm_train.data.target_set import TargetSet
from sm_train.exported import SpeechLlm
from sm_train.exported.writing import ExportConfig, export
from sm_train.models.mapper import MapperConfig, SpeechMapper
from sm_train.models.tokenizer import read_tokenizer

MESSAGES = {"asr": "Say.\n{speech}", "st": "In {target_language}.\n{speech}"}


def run_folder(run: Path, shard_set: Path, *, tuned: bool = False) -> Path:
    """A run with one checkpoint of stage 1, or of a tuning, as evaluation and export read them."""
    targets, dataset = TargetSet(shard_set, "tiny"), files.read_json(shard_set / "dataset.json")
    torch.manual_seed(int(tuned))
    width = dataset["width"]
    shape = MapperConfig(widths=[width, 16, 16], layers=1, heads=2, feed_forward=16)
    mapper = SpeechMapper(shape, width, targets.rows_RD.shape[1])
    step = run / "checkpoints" / "step-3"
    step.mkdir(parents=True)
    save_file(dict(mapper.state_dict()), step / "mapper.safetensors")
    files.write_json(step / "config.json", mapper.description())
    of_encoder = {name: dataset[name] for name in ("encoder", "encoder_revision", "encoder_hash", "layer", "pool")}
    of_llm = {name: targets.contract[name] for name in ("llm", "llm_revision", "tokenizer_hash", "pad_id")}
    contract = {**of_encoder, **of_llm, "splits": ["train"]}
    if tuned:
        chat = Chat(read_tokenizer(Path(targets.contract["llm"])))
        rendered = {f"rendered.{message}": chat.halves(message) for message in MESSAGES.values()}
        tasks = {"asr": 0.5, "st-fr": 0.5}
        contract |= {"stage": "tune", "tasks": tasks, "objective.sigma": 0.0, "mapper_hash": "a", **rendered}
    files.write_json(step / "state.json", {"global_step": 3, "contract": contract})
    for link in ("latest", "best"):
        (step.parent / link).symlink_to("step-3")
    trim = {} if tuned else {"trim": "change_point"}
    (run / "config.yaml").write_text(json.dumps({"shards": str(shard_set), "target": "tiny", **trim}))
    (run / "metrics.jsonl").write_text('{"step": 3, "loss": 0.5, "valid_wer": 0.9}\n{"step": 4, "loss": 0.1}\n')
    return run


def recordings(manifest: Path) -> list[Path]:
    """The corpus's files of audio."""
    return sorted((manifest.parent / "audio").iterdir())


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, shard_set: Path) -> Path:
    """A run of stage 1."""
    return run_folder(tmp_path_factory.mktemp("runs") / "one", shard_set)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, run: Path) -> Path:
    """Its export, whose models are in their own folders; its longest answer is of 8 tokens."""
    return export(ExportConfig(str(run), str(tmp_path_factory.mktemp("exports") / "one"), max_new_tokens=8))


@pytest.fixture(scope="session")
def model(exported: Path) -> SpeechLlm:
    """That export, loaded."""
    return SpeechLlm.from_pretrained(exported, device="cpu")
