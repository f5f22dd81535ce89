"""An export says what evaluation and ask say, and needs few packages to say it."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sm_train import ask, evaluate
from sm_train.data.shards import read_table
from sm_train.exported import SpeechLlm
from sm_train.exported.writing import ExportConfig, export
from tests import builders, exporting
from tests.exporting import MESSAGES, exported, run  # noqa: F401

pytestmark = pytest.mark.slow

LANGUAGE = {"asr": "en", "st": "fr"}


def instructions(path: Path, manifest_rows: list[dict[str, object]]) -> Path:
    """Both tasks about every utterance of the split dev."""
    tasks = [
        {"utterance_id": row["id"], "task": task, "target_lang": code, "answer": "a"}
        for row in manifest_rows
        if row["split"] == "dev"
        for task, code in LANGUAGE.items()
    ]
    path.write_text("".join(json.dumps(task) + "\n" for task in tasks))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shard_set: Path, manifest: Path) -> list[Path]:
    """A run of stage 1 and a tuning, both evaluated into the former's hypotheses.jsonl."""
    folder, rows = tmp_path_factory.mktemp("evaluated"), read_table(shard_set, "utterances.parquet").to_pylist()
    stage1 = exporting.run_folder(folder / "one", shard_set)
    tuned = exporting.run_folder(folder / "tuned", shard_set, tuned=True)
    (folder / "prompts.yaml").write_text(json.dumps({task: {"train": [m]} for task, m in MESSAGES.items()}))
    values = {
        "run": str(stage1), "tuned": [str(tuned)], "shards": str(shard_set), "target": "tiny", "splits": ["dev"],
        "instructions": str(instructions(folder / "tasks.jsonl", rows)),
        "prompts": str(folder / "prompts.yaml"), "audio_root": str(manifest.parent), "max_new_tokens": 12,
        "llm": {"path": json.loads((tuned / "checkpoints/step-3/state.json").read_text())["contract"]["llm"]},
    }  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(values))
    evaluate.main([str(folder / "config.yaml")])
    return [stage1, tuned]


@pytest.mark.parametrize("number", [0, 1], ids=["stage 1", "tuned"])
def test_an_export_says_what_evaluation_said(
    runs: list[Path], number: int, manifest: Path, tmp_path: Path
) -> None:  # fmt: skip
    folder = export(ExportConfig(str(runs[number]), str(tmp_path / "out"), max_new_tokens=12, results=str(runs[0])))
    model = SpeechLlm.from_pretrained(folder)
    lines = [json.loads(line) for line in (runs[0] / "hypotheses.jsonl").read_text().splitlines()]
    asked = [line for line in lines if line["system"] == model.config.system]
    heard = [line for line in lines if line["system"] == f"{model.config.system}, no LLM"]
    assert len(asked) == 2 * len(heard) > 8
    audio = {line["id"]: manifest.parent / "audio" / f"{line['id'].removeprefix('utt-')}.flac" for line in asked}
    prompts = [line["prompt"].replace("{target_language}", "French") for line in asked]
    said = model.generate([(audio[line["id"]], prompt) for line, prompt in zip(asked, prompts, strict=True)])
    assert said == [line["hypothesis"] for line in asked]
    transcripts = [line["hypothesis"] for line in heard]
    assert [model.transcript(audio[line["id"]]) for line in heard] == transcripts
    assert len({*said, *transcripts}) > 2  # they could differ: nothing here was trained
    first = audio[asked[0]["id"]]
    assert ask.answer(runs[number], first, prompts[0], 12) == (model.transcript(first), said[0])
    card = (folder / "README.md").read_text()
    assert f"| {model.config.system} | dev, asr | WER |" in card
    assert "| topline | dev, asr | WER |" in card


LIGHT = """
import sys
ALLOWED = {*sys.argv[1].split(","), *sys.stdlib_module_names}
class Only:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        is_allowed = name.partition(".")[0] in ALLOWED or name.startswith("_sysconfigdata")
        return self.finder.find_spec(name, path, target) if is_allowed else None
sys.meta_path[:] = [Only(finder) for finder in sys.meta_path]
from sm_train.exported import SpeechLlm
model = SpeechLlm.from_pretrained(sys.argv[2])
print(model.generate(sys.argv[3], "What is said?"))
"""


def needed() -> set[str]:
    """Modules of the packages that pyproject.toml's dependencies bring, without any extra."""
    project = tomllib.loads((builders.ROOT / "pyproject.toml").read_text())["project"]
    names, waiting = set[str](), [Requirement(text).name for text in project["dependencies"]]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in names:
            continue
        names.add(name)
        try:
            requirements = [Requirement(text) for text in metadata.requires(name) or ()]
        except metadata.PackageNotFoundError:  # optional here, or by another name
            continue
        waiting += [one.name for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    found = metadata.packages_distributions().items()
    return {"sm_train", *(module for module, of in found if names & set(map(canonicalize_name, of)))}


def test_answers_need_torch_transformers_and_little_else(exported: Path, manifest: Path) -> None:  # noqa: F811
    """As in an environment without deepspeed, ray, streaming, tensorboard, jiwer, sacrebleu, matplotlib, accelerate."""
    recording = exporting.recordings(manifest)[0]
    modules = needed()
    assert not modules & {"deepspeed", "ray", "streaming", "jiwer", "matplotlib", "accelerate"}
    allowed = ",".join(modules)
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, allowed, exported, recording], env=builders.child_env(), cwd=exported,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == SpeechLlm.from_pretrained(exported).generate(recording, "What is said?")
    refused = subprocess.run(
        [sys.executable, "-c", LIGHT, ",".join(modules - {"xxhash"}), exported, recording], env=builders.child_env(),
        cwd=exported, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "No module named 'xxhash'" in refused.stderr  # it is as if it were not installed
