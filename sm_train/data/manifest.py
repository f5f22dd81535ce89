"""Manifests and instructions: which utterances there are, and what is asked about them. The only reader of either."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from sm_train.data.store import Absent
from sm_train.errors import UserError
from sm_train.records import Task, Unit, Utterance

MANIFEST_COLUMNS = ("id", "audio", "start_s", "duration_s", "text", "lang", "speaker", "split")
MANIFEST_DEFAULTS: dict[str, Any] = {"start_s": 0.0, "lang": "", "speaker": "", "split": "train"}
INSTRUCTION_COLUMNS = ("utterance_id", "task", "variables", "target_lang", "answer")
INSTRUCTION_DEFAULTS: dict[str, Any] = {"variables": None, "target_lang": None}
TASKS = ("asr", "st", "sqa")
_LONGEST_LINE = 16 << 20  # bytes of a JSON line
_LONGEST_ID = 1000
_LONGEST_S = 1e7  # of a recording: four months


def root_of(path: Path | str) -> str:
    """Where the relative audio paths of a manifest start: its folder, or the prefix of its address."""
    if "://" in str(path):
        return str(path).rpartition("/")[0]
    return str(Path(path).resolve().parent)


def read_manifest(path: Path | str) -> list[Utterance]:
    """The utterances of a Parquet or JSONL manifest, in its order.

    Args:
        path: a file, or its address (s3://bucket/manifest.parquet).

    Raises:
        UserError: the file is missing or unreadable, a column is missing, an id is empty or appears twice, a start or
            a duration is no time.
    """
    rows = read_rows(path, MANIFEST_COLUMNS, MANIFEST_DEFAULTS)
    first_row: dict[str, int] = {}
    utterances = []
    for number, row in enumerate(rows, start=1):
        identity = "" if row["id"] is None else str(row["id"])
        if not identity:
            raise UserError(f"manifest {path}, row {number}: the id is empty; every utterance needs one")
        if identity in first_row:
            raise UserError(
                f"manifest {path}: id {identity!r} stands in row {first_row[identity]} and in row {number}; "
                "ids must be unique, so rename or remove one"
            )
        if len(identity) > _LONGEST_ID or any(ord(c) < 32 or ord(c) == 127 for c in identity):
            what = f"{len(identity)} characters" if len(identity) > _LONGEST_ID else "a control character"
            raise UserError(
                f"manifest {path}, row {number}: the id {identity[:80]!r} has {what}; "
                f"give one line of up to {_LONGEST_ID}"
            )
        first_row[identity] = number
        try:
            utterances.append(to_utterance(identity, row))
        except (TypeError, ValueError) as error:
            raise UserError(f"manifest {path}, row {number} (id {identity!r}): {error}") from None
    if not utterances:
        raise UserError(f"manifest {path} holds no utterance")
    return utterances


def to_utterance(identity: str, row: dict[str, Any]) -> Utterance:
    """The utterance of a manifest's row.

    Raises:
        TypeError, ValueError: a start or a duration is no time; the message says which.
    """
    start_s, duration_s = float(row["start_s"] or 0.0), float(row["duration_s"] or 0.0)
    if not 0 < duration_s <= _LONGEST_S:
        raise ValueError(f"duration_s is {row['duration_s']!r}; it must be the measured length in seconds, above zero")
    if not 0 <= start_s <= _LONGEST_S:
        raise ValueError(f"start_s is {row['start_s']!r}; it must be zero or a time in seconds")
    return Utterance(
        id=identity,
        audio=_string(row, "audio"),
        start_s=start_s,
        duration_s=duration_s,
        text=_string(row, "text"),
        lang=_string(row, "lang"),
        speaker=_string(row, "speaker"),
        split=_string(row, "split"),
    )


def _string(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if isinstance(value, bytes | list | dict):
        raise TypeError(f"{name} is of the type {type(value).__name__}; a string is wanted")
    text = str(value or "")
    text.encode()  # half a surrogate, as JSON can spell it, has no bytes
    return text


def manifest_hash(utterances: Sequence[Utterance]) -> str:
    """A hash of every field of every utterance in order: equal for a Parquet and a JSONL of the same rows."""
    digest = hashlib.sha256()
    for u in utterances:
        fields = [u.id, u.audio, u.start_s, u.duration_s, u.text, u.lang, u.speaker, u.split]
        digest.update(json.dumps(fields, ensure_ascii=False).encode())
    return digest.hexdigest()[:32]


def cut_units(utterances: Sequence[Utterance], unit_utterances: int) -> list[Unit]:
    """Consecutive runs of ``unit_utterances`` rows: a pure function of the manifest."""
    starts = range(0, len(utterances), unit_utterances)
    return [Unit(index, tuple(utterances[start : start + unit_utterances])) for index, start in enumerate(starts)]


def read_instructions(path: Path | str) -> list[Task]:
    """The tasks of a Parquet or JSONL instructions file; ``variables`` is a JSON object, or one in a string.

    Raises:
        UserError: the file is missing, a column is missing, a task is not asr, st or sqa, or variables are not JSON.
    """
    rows = enumerate(read_rows(path, INSTRUCTION_COLUMNS, INSTRUCTION_DEFAULTS), start=1)
    return [to_task(row, f"instructions {path}, row {number}") for number, row in rows]


def to_task(row: dict[str, Any], where: str) -> Task:
    """The task of an instructions row; ``where`` begins the message of an error.

    Raises:
        UserError: a task is not asr, st or sqa, variables are not JSON, an answer or st's language is missing.
    """
    if row["task"] not in TASKS:
        raise UserError(f"{where}: task {row['task']!r} is not one of {', '.join(TASKS)}")
    variables = row["variables"] or {}
    if isinstance(variables, str):
        try:
            variables = json.loads(variables)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: variables {variables!r} are not a JSON object ({error})") from None
    if not isinstance(variables, dict):
        raise UserError(f"{where}: variables {row['variables']!r} are not a JSON object")
    if not str(row["answer"] or "").strip():
        raise UserError(f"{where}: the answer is empty; every task needs one to be scored against")
    if row["task"] == "st" and not row["target_lang"]:
        raise UserError(f"{where}: st needs a target_lang, a code as fr")
    texts = {str(name): str(value) for name, value in variables.items() if value is not None}
    return Task(str(row["utterance_id"]), row["task"], texts, str(row["target_lang"] or "en"), str(row["answer"]))


def read_rows(path: Path | str, columns: Sequence[str], optional: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet or JSONL file, these columns alone, those of ``optional`` with their defaults.

    Raises:
        UserError: the file is missing or unreadable, or a column is missing.
    """
    with _open(path) as file:
        rows = _read_jsonl(path, file) if str(path).endswith(".jsonl") else _read_parquet(path, file)
        for number, row in enumerate(rows, start=1):
            for name in columns:
                if name not in row and name not in optional:
                    raise UserError(f"{path}, row {number}: there is no column {name!r}; there are {', '.join(row)}")
            yield {name: row.get(name, optional.get(name)) for name in columns}


def _open(path: Path | str) -> BinaryIO:
    """A file, or the bytes of an object."""
    if str(path).startswith("file://"):
        raise UserError(f"{path}: a file on a disk is named by its path, as {str(path).removeprefix('file://')}")
    if "://" in str(path):
        from sm_train.data.remote import Remote  # and with it Arrow's file systems

        folder, _, name = str(path).rpartition("/")
        try:
            return BytesIO(Remote(folder).read(name))
        except Absent:
            raise UserError(f"file {path} does not exist") from None
    if not Path(path).is_file():
        raise UserError(f"file {path} does not exist")
    return Path(path).open("rb")


def _read_jsonl(path: Path | str, file: BinaryIO) -> Iterator[dict[str, Any]]:
    lines = iter(lambda: file.readline(_LONGEST_LINE), b"")
    for number, line in enumerate(lines, start=1):
        if len(line) == _LONGEST_LINE:
            raise UserError(f"{path}, line {number}: longer than {_LONGEST_LINE >> 20} MiB; give a row a line")
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f'{path}, line {number}: a JSON object is wanted, as {{"id": ...}}')
        yield row


def _read_parquet(path: Path | str, file: BinaryIO) -> Iterator[dict[str, Any]]:
    try:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches():
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from None
