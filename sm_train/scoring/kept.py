"""Answers kept aside piece by piece: what ranks hand to each other, and what an interrupted evaluation goes on from."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from sm_train import config, files
from sm_train.errors import UserError

FOLDER = f"{files.ASIDE}answers"
_PATIENCE_S = 30.0
"""A network file system may show a file of another host that late."""


@dataclass(frozen=True, slots=True)
class Work:
    """What some answers took."""

    prompt_tokens: int = 0
    """That the LLM read, positions of speech (or the tokens in its place) among them."""
    speech_positions: int = 0
    answer_tokens: int = 0
    """That the LLM wrote, the one that ends an answer among them."""
    map_s: float = 0.0
    """Until the vectors, and the transcripts without the LLM, were there."""
    decode_s: float = 0.0

    def __add__(self, other: Work) -> Work:
        mine, theirs = asdict(self), asdict(other)
        return Work(**{name: mine[name] + theirs[name] for name in mine})


@dataclass(frozen=True, slots=True)
class Answered:
    """A piece of the questions, answered by one system."""

    texts: Sequence[str]
    transcripts: Sequence[str | None]
    """Without the LLM; None where the system has none or the question does not ask for one."""
    work: Work


class Kept:
    """The answers of one evaluation, by (system, piece), in a folder that all its ranks share.

    A piece is a line of JSON, and each process writes a file of its own: a line that a killed one has torn is passed
    over, and its piece is answered again. The folder is named by ``asked``, all that the answers follow from: what was
    asked otherwise is neither read nor lost.
    """

    def __init__(self, results: Path, asked: Mapping[str, Any], rank: int = 0) -> None:
        self.rank, self._results = rank, results
        self.folder = results / f"{FOLDER}-{config.fingerprint(asked)}"
        self._file: TextIO | None = None

    def read(self) -> dict[tuple[int, int], Answered]:
        """Every piece that is there."""
        found = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").split("\n"):
                try:
                    said = json.loads(line)
                except ValueError:
                    continue
                answered = Answered(said["texts"], said["transcripts"], Work(**said["work"]))
                found[said["system"], said["piece"]] = answered
        return found

    def read_all(self, wanted: set[tuple[int, int]]) -> dict[tuple[int, int], Answered]:
        """Every piece, once all ranks are through.

        Raises:
            UserError: one is not there, as where each rank has a file system of its own.
        """
        start = time.monotonic()
        while missing := wanted - (found := self.read()).keys():
            if time.monotonic() - start > _PATIENCE_S:
                raise UserError(
                    f"{self.folder}: {len(missing)} of {len(wanted)} pieces of the answers are not there; "
                    "the ranks' results must go to a file system that all of them share"
                )
            time.sleep(1)
        return found

    def add(self, system: int, piece: int, answered: Answered) -> None:
        """Keep one more."""
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, _ = tempfile.mkstemp(".jsonl", f"rank{self.rank}-", self.folder)
            self._file = os.fdopen(handle, "w", encoding="utf-8")
        self._file.write(json.dumps({"system": system, "piece": piece, **asdict(answered)}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """For every rank, when it has answered its last piece: from here on the others see what it wrote."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Leave nothing, of other evaluations into this folder neither."""
        for folder in self._results.glob(f"{FOLDER}-*"):
            shutil.rmtree(folder, ignore_errors=True)
