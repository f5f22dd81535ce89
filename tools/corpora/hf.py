"""Hugging Face dataset on disk: what save_to_disk wrote, one set or one folder a split, or Parquet shards.

Columns are found by their usual names or named by options. Audio that is embedded is written to OUT/audio/ID.*; audio
that is a path stays where it is, relative paths start at SOURCE. The split is that of dataset_dict.json, state.json
or of a shard's name (train-00000-of-00012.parquet); validation becomes dev. Read by pyarrow alone; nothing of the set
is run.
Layout: https://huggingface.co/docs/datasets (save_to_disk, Dataset features: Audio)
"""

from __future__ import annotations

import hashlib
import os
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sm_train.errors import UserError
from tools.corpora.entries import Entry, Skipped
from tools.corpora.reading import AUDIO_SUFFIXES, json_file

_USUAL = {
    "audio": ("audio", "speech", "audio_path", "file", "path"),
    "text": ("text", "sentence", "transcription", "transcript", "raw_text", "normalized_text"),
    "id": ("id", "utterance_id", "audio_id", "segment_id"),
    "speaker": ("speaker", "speaker_id", "client_id", "speaker_name"),
    "lang": ("lang", "language", "locale"),
    "question": ("question",),
    "answer": ("answer",),
}
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}.*\.parquet")
_KINDS = ((b"RIFF", ".wav"), (b"fLaC", ".flac"), (b"OggS", ".ogg"), (b"ID3", ".mp3"), (b"\xff", ".mp3"))


def arguments(parser: ArgumentParser) -> None:
    """Options of its own."""
    for field, usual in _USUAL.items():
        parser.add_argument(f"--{field}-column", metavar="NAME", help=f"by default the first of {', '.join(usual)}")
    parser.add_argument(
        "--translation", nargs="+", default=[], metavar="COLUMN=LANG", help="columns of translations, as translation=fr"
    )


def entries(source: Path, asked: Namespace, skipped: Skipped) -> Iterator[Entry]:
    """The rows of every shard of every split."""
    try:
        shards = list(_shards(source, asked.out))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{source}: dataset_dict.json or state.json is not what save_to_disk writes ({error!r})"
        ) from None
    if not shards:
        raise UserError(f"{source} is no dataset on disk: no dataset_dict.json, no state.json, no *.parquet")
    translations = dict(_translation(word) for word in asked.translation)
    taken: set[str] = set()
    for path, split in shards:
        row = -1
        try:
            for row, (columns, cells) in enumerate(_rows(path, asked, translations)):
                where = f"{path.relative_to(source).as_posix()}:{row}"
                entry = _entry(cells, columns, where, split, source, asked.out / "audio", taken, skipped)
                if entry:
                    for column, lang in translations.items():
                        said = cells[column]
                        said = said.get(lang) if isinstance(said, dict) else said  # the Translation feature
                        entry.translate(lang, str(said or ""))
                    yield entry
        except (pa.ArrowException, OSError) as error:
            skipped.add("bad_file", path.name, f"nothing after row {row} can be read: {str(error).splitlines()[0]}")


def _translation(word: str) -> tuple[str, str]:
    column, equals, lang = word.rpartition("=")
    if not equals or not column or not lang:
        raise UserError(f"--translation {word!r} is not of the form COLUMN=LANG, as translation=fr")
    return column, lang


def _shards(source: Path, out: Path) -> Iterator[tuple[Path, str]]:
    """(file, split) in the set's own order."""
    if (source / "dataset_dict.json").is_file():
        for split in json_file(source / "dataset_dict.json")["splits"]:
            yield from _saved(_plain(source, split), _named(str(split)))
    elif (source / "state.json").is_file():
        yield from _saved(source, _named(str(json_file(source / "state.json").get("_split") or "")))
    else:
        own = {Path(os.path.abspath(out / name)) for name in ("manifest.parquet", "instructions.parquet")}
        for path in sorted(source.rglob("*.parquet")):
            match = _SHARD.fullmatch(path.name)
            if Path(os.path.abspath(path)) not in own:
                yield path, _named(match.group(1)) if match else ""


def _saved(folder: Path, split: str) -> Iterator[tuple[Path, str]]:
    state = json_file(folder / "state.json")
    if state.get("_indices_data_files"):
        raise UserError(f"{folder} is a selection of another set's rows; call flatten_indices() and save_to_disk again")
    for file in state["_data_files"]:
        yield _plain(folder, file["filename"]), split


def _plain(folder: Path, name: object) -> Path:
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        raise UserError(f"{folder} names {name!r}, which is not a name in that folder; it is not read")
    return folder / name


def _named(split: str) -> str:
    return "dev" if split in ("validation", "valid", "val") else split


def _rows(path: Path, asked: Namespace, extra: Mapping[str, str]) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """The columns in use, and a row's cells, one row in memory at a time."""
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            columns = _columns(path, file.schema_arrow.names, asked, extra)
            for batch in file.iter_batches(batch_size=64, columns=[*columns.values(), *extra]):
                yield from ((columns, cells) for cells in _cells(batch))
        return
    with pa.memory_map(str(path)) as mapped:
        try:
            reader: Any = pa.ipc.open_stream(mapped)
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(mapped)
        columns = _columns(path, reader.schema.names, asked, extra)
        batches = (
            reader if hasattr(reader, "read_next_batch") else map(reader.get_batch, range(reader.num_record_batches))
        )
        for batch in batches:
            yield from ((columns, cells) for cells in _cells(batch.select([*columns.values(), *extra])))


def _cells(batch: Any) -> Iterator[dict[str, Any]]:
    for row in range(batch.num_rows):
        yield {name: batch.column(name)[row].as_py() for name in batch.schema.names}


def _columns(path: Path, there: list[str], asked: Namespace, extra: Mapping[str, str]) -> dict[str, str]:
    columns = {}
    for field, usual in _USUAL.items():
        named = getattr(asked, f"{field}_column")
        column = named or next((name for name in usual if name in there), None)
        if column not in there and (named or field in ("audio", "text")):
            raise UserError(
                f"{path} has no column {named or ' or '.join(usual)}; --{field}-column is one of {', '.join(there)}"
            )
        if column:
            columns[field] = column
    if missing := [name for name in extra if name not in there]:
        raise UserError(f"{path} has no column {missing[0]}; there are {', '.join(there)}")
    return columns


def _entry(
    cells: dict[str, Any], columns: dict[str, str], where: str, split: str, source: Path, folder: Path, taken: set[str],
    skipped: Skipped,
) -> Entry | None:  # fmt: skip
    said = {field: cells[column] for field, column in columns.items()}
    text = {field: "" if value is None else str(value) for field, value in said.items() if field != "audio"}
    audio = said["audio"] if isinstance(said["audio"], dict) else {"path": said["audio"]}
    content, path = audio.get("bytes"), audio.get("path")
    if not isinstance(content, bytes | None) or not isinstance(path, str | None) or not (content or path):
        skipped.add("missing_audio", where, "the audio column has neither bytes nor a path")
        return None
    identity = text.get("id") or (Path(path).stem if path else "")
    if "id" not in columns and (not identity or identity in taken):
        identity = f"{split or 'row'}-{where.rpartition(':')[2].zfill(7)}"
    if identity in taken:
        skipped.add("duplicate_id", where, f"id {identity!r} is taken by an earlier row")
        return None
    taken.add(identity)
    if content and text["text"].strip():
        place = folder / file_name(identity, _suffix(path, content))
        _write_bytes(place, content)
    else:
        place = source / (path or identity)
    entry = Entry(identity, place, text["text"], where, lang=text.get("lang", ""), split=split)
    entry.speaker = text.get("speaker", "")
    entry.ask(text.get("question", ""), text.get("answer", ""))
    return entry


def _suffix(path: str | None, content: bytes) -> str:
    suffix = Path(path or "").suffix.lower()
    sniffed = next((kind for start, kind in _KINDS if content.startswith(start)), ".audio")
    return suffix if suffix in AUDIO_SUFFIXES else sniffed


def file_name(identity: str, suffix: str) -> str:
    """A plain file name for an id: itself, or what is left of it and a hash, so that no two are the same."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", identity).lstrip(".")[:100]
    if plain != identity:
        plain += f"-{hashlib.sha256(identity.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
    return plain + suffix


def _write_bytes(path: Path, content: bytes) -> None:
    if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".aside-{path.name}")
    aside.write_bytes(content)
    os.replace(aside, path)
