"""Tab-separated lists: fairseq's (root in line 1, PATH and frames, texts in .wrd or .ltr), or with a header.

SOURCE is such a file, or a folder of them. fairseq's split is the file's name (train.tsv, valid.tsv); the file of
texts has a line for each, letters of .ltr are joined to words. With a header the columns are id, audio, text,
start_s, duration_s, lang, speaker, split, question, answer, and text.fr and the like for translations; of fairseq's
S2T lists tgt_text, src_text, src_lang and tgt_lang are known too. Without an id the file's name is one. Relative
paths start at --audio-root, by default at fairseq's line 1, or at the list's folder.
Layout: https://github.com/facebookresearch/fairseq (examples/wav2vec, examples/speech_to_text)
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

from sm_train.errors import UserError
from tools.corpora.entries import Entry, Skipped
from tools.corpora.reading import below, first_of, lines, number, table, unique_names

_COLUMNS = {
    "audio": ("audio", "audio_path", "path", "file", "wav"),
    "text": ("text", "sentence", "transcript", "transcription", "src_text"),
    "id": ("id", "utterance_id"),
    "lang": ("lang", "language", "src_lang"),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "split": ("split",),
}


def arguments(parser: ArgumentParser) -> None:
    """Options of its own."""
    parser.add_argument("--audio-root", type=Path, help="folder that relative audio paths start at")


def entries(source: Path, asked: Namespace, skipped: Skipped) -> Iterator[Entry]:
    """The rows of one list or several."""
    paths = sorted(source.glob("*.tsv")) if source.is_dir() else [source]
    if not paths:
        raise UserError(f"{source} holds no .tsv")
    for path in paths:
        _, first = next(lines(path, skipped), ("", ""))
        if not first:
            raise UserError(f"{path} is empty")
        if "\t" in first:
            yield from _with_header(path, asked, skipped)
        else:
            yield from _fairseq(path, Path(asked.audio_root or path.parent / first), asked, skipped)


def _fairseq(path: Path, root: Path, asked: Namespace, skipped: Skipped) -> Iterator[Entry]:
    texts = next((path.with_suffix(end) for end in (".wrd", ".ltr") if path.with_suffix(end).is_file()), None)
    if texts is None:
        raise UserError(
            f"{path} is a list of fairseq, but neither {path.stem}.wrd nor {path.stem}.ltr stands beside it"
        )
    listed, said = _raw(path)[1:], _raw(texts)
    if len(listed) != len(said):
        raise UserError(
            f"{path} lists {len(listed)} files, {texts.name} has {len(said)} lines; they belong together by line"
        )
    names = [line.partition("\t")[0] for line in listed]
    ids = unique_names(Path(name) for name in names)
    for row, (name, text) in enumerate(zip(names, said, strict=True), start=2):
        where = f"{path.name}:{row}"
        audio = below(root, name)
        if audio is None:
            skipped.add("outside", where, f"{name!r} leaves the root {root}")
            continue
        words = "".join(text.split()).replace("|", " ") if texts.suffix == ".ltr" else text
        yield Entry(ids[Path(name)], audio, words, where, split=asked.split or path.stem)


def _raw(path: Path) -> list[str]:
    """The lines of a file, empty ones too."""
    return path.read_bytes().decode("utf-8-sig", "replace").replace("\r\n", "\n").removesuffix("\n").split("\n")


def _with_header(path: Path, asked: Namespace, skipped: Skipped) -> Iterator[Entry]:
    rows = list(table(path, skipped))
    if rows and not any(name in rows[0][1] for name in _COLUMNS["audio"]):
        raise UserError(f"{path}: its header names no audio column ({', '.join(_COLUMNS['audio'])})")
    root = asked.audio_root or path.parent
    named = [root / name for _, row in rows if (name := first_of(row, _COLUMNS["audio"]))]
    ids = unique_names(named)
    for where, row in rows:
        said = {field: str(first_of(row, names)) for field, names in _COLUMNS.items()}
        if not said["audio"]:
            skipped.add("bad_row", where, "it names no audio")
            continue
        try:
            start_s = number(row.get("start_s") or 0.0)
            duration_s = number(row["duration_s"]) if row.get("duration_s") else None
        except ValueError as error:
            skipped.add("bad_row", where, str(error))
            continue
        audio = root / said["audio"]
        identity = said["id"] or ids[audio]
        entry = Entry(
            identity, audio, said["text"], where, start_s, duration_s, said["lang"], said["speaker"], said["split"]
        )
        for column, text in row.items():
            if column.startswith("text."):
                entry.translate(column.removeprefix("text."), text)
        if row.get("tgt_text") and row.get("tgt_lang"):
            entry.translate(row["tgt_lang"], row["tgt_text"])
        entry.ask(row.get("question", ""), row.get("answer", ""))
        yield entry
