"""Manifests and instructions: which utterances there are, and what is asked about them. The only reader of either."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
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
        UserError: the file is missing or unreadable, a column is missing, or :func:`check_row` refuses a row.
    """
    rows = read_rows(path, MANIFEST_COLUMNS, MANIFEST_DEFAULTS)
    first_row: dict[str, int] = {}
    utterances = []
    for number, row in enumerate(rows, start=1):
        try:
            utterances.append(check_row(row, number, first_row))
        except BadRow as error:
            whose = f" (id {error.id!r})" if error.id else ""
            raise UserError(f"manifest {path}, row {number}{whose}: {error}") from None
    if not utterances:
        raise UserError(f"manifest {path} holds no utterance")
    return utterances


class BadRow(ValueError):
    """A manifest with this row is refused: ``reason`` is a code, ``str(error)`` what is wrong, ``id`` whose it is."""

    def __init__(self, reason: str, detail: str, identity: str = "") -> None:
        super().__init__(detail)
        self.reason, self.id = reason, identity


def check_row(row: Mapping[str, Any], number: int, first_row: dict[str, int]) -> Utterance:
    """The utterance of a manifest's row.

    Args:
        number: of the row, from 1.
        first_row: the rows of the ids so far; this one's is added.

    Raises:
        BadRow: empty_id, duplicate_id or bad_id, without an id; bad_time or bad_value, with it.
    """
    identity = "" if row["id"] is None else str(row["id"])
    if not identity:
        raise BadRow("empty_id", "the id is empty; every utterance needs one")
    if identity in first_row:
        raise BadRow(
            "duplicate_id",
            f"id {identity!r} stands in row {first_row[identity]} and in row {number}; "
            "ids must be unique, so rename or remove one",
        )
    first_row[identity] = number
    if what := wrong_id(identity):
        raise BadRow("bad_id", f"the id {identity[:80]!r} has {what}; give one line of up to {_LONGEST_ID}")
    start_s, duration_s = _seconds(row, "start_s", identity), _seconds(row, "duration_s", identity)
    if not 0 < duration_s <= _LONGEST_S:
        detail = f"duration_s is {row['duration_s']!r}; it must be the measured length in seconds, above zero"
        raise BadRow("bad_time", detail, identity)
    if not 0 <= start_s <= _LONGEST_S:
        detail = f"start_s is {row['start_s']!r}; it must be zero or a time in seconds"
        raise BadRow("bad_time", detail, identity)
    try:
        texts = {name: _string(row, name) for name in ("audio", "text", "lang", "speaker", "split")}
    except (TypeError, ValueError) as error:
        raise BadRow("bad_value", str(error), identity) from None
    return Utterance(id=identity, start_s=start_s, duration_s=duration_s, **texts)


def wrong_id(identity: str) -> str:
    """What makes an id unusable; empty if nothing does."""
    if len(identity) > _LONGEST_ID:
        return f"{len(identity)} characters"
    if any(ord(c) < 32 or ord(c) == 127 for c in identity):
        return "a control character"
    return "half a surrogate" if any("\ud800" <= c <= "\udfff" for c in identity) else ""


def _seconds(row: Mapping[str, Any], name: str, identity: str) -> float:
    try:
        return float(row[name] or 0.0)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadRow("bad_time", f"{name}: {error}", identity) from None


def _string(row: Mapping[str, Any], name: str) -> str:
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
    try:
        "".join([str(row["answer"]), *texts.values()]).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: half a surrogate in {row['answer']!r} or its variables has no bytes") from None
    return Task(str(row["utterance_id"]), row["task"], texts, str(row["target_lang"] or "en"), str(row["answer"]))


def read_rows(path: Path | str, columns: Sequence[str], optional: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet or JSONL file, these columns alone, those of ``optional`` with their defaults.

    Raises:
        Absent: the file is missing.
        UserError: it is unreadable, or a column is missing.
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
        if "://" not in folder:
            raise UserError(f"{path} names no file in a bucket; give an address as s3://bucket/manifest.parquet")
        try:
            return BytesIO(Remote(folder).read(name))
        except Absent:
            raise Absent(f"file {path} does not exist") from None
    if not Path(path).is_file():
        raise Absent(f"file {path} does not exist")
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
