"""A model in a folder, in the cache, on a hub: asked for without fetching it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from huggingface_hub import constants

from cluster.fit.hub import Answer, ask, folder_of, is_repo, missing_weights, settings
from tests.unit.test_fetch import Hub, hub  # noqa: F401
from tests.unit.test_need import write


def test_a_model_is_here_whole_or_not(tmp_path: Path) -> None:
    folder = write(tmp_path)
    assert ask(str(folder), None) == Answer(
        False, f"{folder} lacks model.safetensors",
        "fetch it again, or copy it with python -m tools.fetch where there is internet, and give its folder",
    )  # fmt: skip
    (folder / "model.safetensors").write_bytes(b"")
    assert ask(str(folder), None).is_had
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "1.safetensors"}}))
    assert missing_weights(folder) == "1.safetensors"
    assert not ask("/nowhere/at/all", None).is_had
    assert folder_of("/nowhere/at/all") is None


def test_a_hub_is_asked_and_answers(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in ask("a/llm", None, endpoint=hub.address).text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.gated = {"b/llm"}
    assert ask("a/llm", None, endpoint=hub.address).is_had
    gated = ask("b/llm", None, endpoint=hub.address)
    assert (gated.is_had, "HF_TOKEN" in gated.remedy) == (False, True)
    assert "has no a/none" in ask("a/none", None, endpoint=hub.address).text
    assert "does not answer" in ask("a/llm", None, endpoint="http://127.0.0.1:9", timeout_s=3).text
    assert not any("safetensors" in asked for asked in hub.asked)


def test_a_model_in_the_cache_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "a" * 40
    repo = tmp_path / "models--a--llm"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(commit)
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    write(snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert is_repo("a/llm")
    assert folder_of("a/llm") == snapshot
    assert "lacks model.safetensors" in ask("a/llm", None).text
    (snapshot / "model.safetensors").touch()
    assert ask("a/llm", None).is_had
    assert folder_of("a/llm", "b" * 40) is None


def test_how_models_are_come_by(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert settings().text.startswith(f"offline, cache {tmp_path / 'hub'}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert settings().is_had
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert not settings().is_had
