"""Hostile artefacts end in one line: no traceback, no code run, nothing outside read, no claimed size allocated."""

from __future__ import annotations

import os
import re
import resource
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sm_train.data.manifest import read_manifest
from sm_train.encoding.decoders import Decoded, DecodePool
from tests import builders, hostile

_MOST_KB = 400_000
watched: set[str] = set()
opened: list[str] = []


def _note_opened(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and watched and isinstance(args[0], str | Path) and args[2] & 3 == os.O_RDONLY:
        try:
            real = os.path.realpath(args[0])
        except ValueError:
            return
        if real in watched:
            opened.append(real)


@pytest.fixture(scope="module", autouse=True)
def _audit() -> Iterator[None]:
    sys.addaudithook(_note_opened)  # which stays, and does nothing once nothing is watched
    yield
    watched.clear()


@pytest.fixture(scope="module")
def pool() -> Iterator[DecodePool]:
    made = hostile.decode_pool()
    yield made
    made.close()


@pytest.fixture(scope="module")
def answers() -> Iterator[dict[str, str]]:
    found: dict[str, str] = {}
    yield found
    print("\n| artefact | answer |\n|---|---|")
    for name, answer in found.items():
        print(f"| {name} | {answer[:160].replace('|', '/')} |")


@pytest.mark.parametrize("name", hostile.CASES)
def test_it_is_refused_in_one_line(
    name: str, shard_set: Path, encoder_folder: Path, llm_folder: Path, pool: DecodePool, tmp_path: Path,
    answers: dict[str, str],
) -> None:  # fmt: skip
    case, says = hostile.CASES[name]
    for what, source in (("set", shard_set), ("llm", llm_folder)):
        shutil.copytree(source, tmp_path / what)
    world = hostile.World(tmp_path, tmp_path / "set", encoder_folder, tmp_path / "llm", pool)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    opened.clear()
    watched.add(os.path.realpath(world.outside))
    try:
        answer = case(world)
    finally:
        watched.clear()
    assert not opened
    answers[name] = answer.replace(str(tmp_path), "...")
    assert re.search(says, answer), answer
    assert answer.isprintable()
    assert len(answer) < 1500
    assert not world.marker.exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < _MOST_KB


def test_what_is_the_persons_own_is_let_be(tmp_path: Path, pool: DecodePool) -> None:
    """A manifest is the person's own: its audio may lie anywhere, linked or not; an id may look like a path."""
    builders.corpus(tmp_path / "far", 1)
    (tmp_path / "linked.flac").symlink_to(tmp_path / "far/audio/000.flac")
    (tmp_path / "here").mkdir()
    names = ["../linked.flac", str(tmp_path / "linked.flac"), "../far/audio/000.flac"]
    rows = [builders.row(f"../en/{i}", name, 1.0, "text") for i, name in enumerate(names)]
    for utterance in read_manifest(builders.write_manifest(tmp_path / "here/m.jsonl", rows)):
        absolute = replace(utterance, audio=str(tmp_path / "here" / utterance.audio))
        assert isinstance(pool.submit(absolute).result(timeout=60), Decoded)
