"""The rules of the house: imports run one way, each library has its place, files stay small, every config loads."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from sm_train import config
from sm_train.evaluate import EvaluateConfig
from sm_train.precompute import PrecomputeConfig
from sm_train.pretrain import PretrainConfig
from sm_train.prompts import read_prompts
from sm_train.tune import TuneConfig
from tests.builders import ROOT
from tools.miniature.build import BuildConfig
from tools.miniature.corpus import CorpusConfig
from tools.plan_capacity.settings import PlanConfig
from tools.reproduce.world import WorldConfig

SOURCES = sorted(path for room in ("sm_train", "cluster", "tools") for path in (ROOT / room).rglob("*.py"))

# A room may import itself and those to its left; train may import scoring, never the other way.
FLOORS = ["base", "data", "models", "encoding", "scoring", "train", "entries", "cluster", "tools"]
BASE = {"errors", "config", "records", "files", "runlog", "prompts", "chat"}

PLACES = {
    "omegaconf": ["sm_train/config.py"],
    "pyarrow": ["sm_train/data/", "tools/miniature/", "tools/corpora/"],
    "boto3": ["sm_train/data/s3.py"],
    "streaming": ["tools/bench/"],
    # Beside models/, the switch that partitions weights over the ranks as they are loaded.
    "transformers": [
        "sm_train/models/",
        "sm_train/exported/",  # what people load is a model, a config and a processor of transformers' own kinds
        "sm_train/train/engines/deepspeed.py",
        "tools/miniature/",
        "tools/bench/padding.py",
        "tools/bench/precompute_peers.py",
    ],  # a sampler to compare with
    "peft": ["sm_train/models/adapter.py"],
    "huggingface_hub": ["sm_train/models/", "tools/fetch.py", "cluster/fit/hub.py"],
    "lhotse": ["tools/bench/"],
    "deepspeed": ["sm_train/train/engines/deepspeed.py", "sm_train/train/engines/zero_state.py"],
    "ray": ["cluster/", "tools/bench/"],
    "soundfile": ["sm_train/data/audio.py", "tools/miniature/", "tools/bench/precompute_peers.py"],
    "soxr": ["sm_train/data/audio.py", "tools/miniature/"],
    "jiwer": ["sm_train/scoring/scores.py"],
    "sacrebleu": ["sm_train/scoring/scores.py", "tools/miniature/build_llm.py"],
    "py3langid": ["sm_train/scoring/language.py"],
    "matplotlib": ["sm_train/scoring/pictures.py", "tools/"],
}
# What stands outside its place for now, each with its reason; the list only ever gets shorter.
EXCEPTIONS: set[tuple[str, str]] = set()


def imported(path: Path) -> Iterator[str]:
    """The modules a file imports anywhere, in full; ``from a import b`` counts as a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor_of(module: str) -> int | None:
    """The floor of a module of ours; None for a library."""
    parts = module.split(".")
    if parts[0] in ("cluster", "tools"):
        return FLOORS.index(parts[0])
    if parts[0] != "sm_train" or len(parts) == 1:
        return None
    if parts[1] in BASE:
        return 0
    return FLOORS.index(parts[1] if parts[1] in FLOORS else "entries")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    return name_of(path).removesuffix("/__init__.py").removesuffix(".py").replace("/", ".")


def test_there_is_something_to_read() -> None:
    assert len(SOURCES) > 40
    assert floor_of("sm_train.data.plan") == 1
    assert floor_of("sm_train.pretrain") == 6
    assert floor_of("torch.nn") is None


def test_imports_run_one_way() -> None:
    wrong = []
    for path in SOURCES:
        own = floor_of(module_of(path))
        for module in imported(path):
            other = floor_of(module)
            if own is not None and other is not None and other > own:
                wrong.append(f"{name_of(path)} imports {module}")
    assert not wrong


@pytest.mark.parametrize("library", PLACES)
def test_a_library_is_imported_in_its_place_alone(library: str) -> None:
    users = {name_of(path) for path in SOURCES if any(m.split(".")[0] == library for m in imported(path))}
    wrong = sorted(
        name for name in users if not name.startswith(tuple(PLACES[library])) and (name, library) not in EXCEPTIONS
    )
    assert not wrong
    assert users, f"nothing imports {library}: the rule can go"


def test_every_exception_is_still_needed() -> None:
    for name, library in EXCEPTIONS:
        assert any(module.split(".")[0] == library for module in imported(ROOT / name)), f"{name}, {library} can go"


def test_files_and_functions_stay_small() -> None:
    large = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 250:
            large.append(f"{name_of(path)} has {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > 60:
                    large.append(f"{name_of(path)}: {node.name} has {lines} lines")
    assert not large


def schema_of(path: Path) -> type:
    if path.parent.name == "miniature":
        return BuildConfig if path.stem.startswith("build") else CorpusConfig
    stages = {
        "precompute": PrecomputeConfig,
        "pretrain": PretrainConfig,
        "tune": TuneConfig,
        "evaluate": EvaluateConfig,
        "plan": PlanConfig,
        "reproduce": WorldConfig,
    }
    return stages[path.parent.name]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=name_of)
def test_every_shipped_config_loads(path: Path) -> None:
    if path.parent.name == "prompts":
        prompts = read_prompts(path)
        assert all(prompts.choose(task, "train", 0, "utt") for task in prompts.prompts)
    else:
        config.load(schema_of(path), [str(path)], "test")
