"""The Dockerfile, as far as it can be held to its word without an engine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import builders
from tests.builders import ROOT

PLACE = "/opt/sm_train"


@pytest.fixture(scope="module")
def steps() -> list[tuple[str, str]]:
    """(instruction, the rest of it) of each step, comments and line ends taken out."""
    text = (ROOT / "cluster/container/Dockerfile").read_text()
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ").splitlines()
    parts = [line.split(maxsplit=1) for line in lines if line]
    return [(name, rest) for name, rest in parts]


def of(steps: list[tuple[str, str]], name: str) -> list[str]:
    return [rest for step, rest in steps if step == name]


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_it_starts_from_a_named_python_that_the_project_takes(steps: list[tuple[str, str]]) -> None:
    (base,) = of(steps, "FROM")
    found = re.fullmatch(r"python:(3)\.(\d+)-slim-\w+", base)
    assert found
    assert 'requires-python = ">=3.11"' in (ROOT / "pyproject.toml").read_text()
    assert int(found[2]) >= 11
    assert "latest" not in (ROOT / "cluster/container/Dockerfile").read_text()


def test_torch_comes_first_as_in_the_makefile_and_the_rest_from_the_lock(steps: list[tuple[str, str]]) -> None:
    found = re.findall(r"^(TORCH|TORCH_INDEX) \?= *(.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert len(found) == 2
    assert of(steps, "ARG") == [f"{name}={value}" for name, value in found]
    torch, rest = [step for step in of(steps, "RUN") if "pip install" in step]
    assert "--index-url" in torch
    assert torch.endswith('"${TORCH}"')
    assert rest.endswith(f"--no-deps -r {PLACE}/requirements.lock")
    pins = re.findall(r"([\w.-]+)==([\w.]+)", " ".join(rest for name, rest in steps if name != "ARG"))
    assert all(locked()[name] == version for name, version in pins)
    assert "torch" not in locked()


def test_it_ends_as_a_user_who_is_not_root_with_no_entry_point(steps: list[tuple[str, str]]) -> None:
    (user,) = of(steps, "USER")
    assert int(user) > 0
    names = [name for name, _ in steps]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name in ("RUN", "COPY"))
    assert not {"ENTRYPOINT", "CMD", "ADD"} & set(names)


def test_what_it_copies_is_there_and_runs(steps: list[tuple[str, str]], tmp_path: Path) -> None:
    """The steps of copying, done in a folder; no other code of ours is in reach."""
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = [copy.split() for copy in of(steps, "COPY")]
    assert {source for source, _ in sources} == let_in
    for source, target in sources:
        to = tmp_path / target.removeprefix("/")
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, to, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            to.mkdir(parents=True)
            shutil.copy(ROOT / source, to)
    (env,) = of(steps, "ENV")
    assert f"PYTHONPATH={PLACE} " in env
    modules = ["sm_train.precompute", "sm_train.tune", "sm_train.evaluate", "cluster.precompute", "tools.fetch"]
    code = f"import importlib; print(*(importlib.import_module(m).__file__ for m in {modules}), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env=builders.child_env(PYTHONPATH=str(tmp_path / PLACE.removeprefix("/"))),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all(line.startswith(str(tmp_path)) for line in done.stdout.splitlines())


def test_a_wheelhouse_takes_the_place_of_every_index() -> None:
    def said(*words: str) -> list[str]:
        made = subprocess.run(["make", "-n", "-B", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
        return [line for line in made.stdout.splitlines() if "/pip " in line]

    offline = said("install", "WHEELHOUSE=/media/wheels", "TORCH_INDEX=https://a/cu126")
    assert len(offline) == 3
    assert all("--no-index" in line for line in offline)
    assert ["--find-links /media/wheels" in line for line in offline] == [True, True, False]
    assert not any("https://" in line for line in offline)
    torch, locked, _ = said("install", "TORCH_INDEX=https://a/cu126")
    assert "--index-url https://a/cu126" in torch
    assert "index" not in locked
    torch, locked = said("wheelhouse", "WHEELHOUSE=w")
    assert torch.endswith("wheel -q  -w w torch==2.13.0")
    assert locked.endswith("wheel -q --no-deps -w w -r requirements.lock")
