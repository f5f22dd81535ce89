"""CoVoST 2 over a Common Voice folder: clips/*.mp3 and covost_v2.en_fr.train.tsv and the like; or Common Voice alone.

SOURCE is Common Voice's folder of one language (clips/, validated.tsv, train.tsv, dev.tsv, test.tsv). CoVoST's files
are looked for in --translations, by default in SOURCE: covost_v2.SRC_TGT.SPLIT.tsv (path, sentence, translation,
client_id), as get_covost_splits.py writes them, or covost_v2.SRC_TGT.tsv (path, translation, split), as they are
downloaded. With them the utterances and splits are CoVoST's; without, Common Voice's train, dev and test,
transcription alone.
Layouts: https://github.com/facebookresearch/covost (README), https://commonvoice.mozilla.org/datasets
"""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

from sm_train.errors import UserError
from tools.corpora.entries import Entry, Skipped, code
from tools.corpora.reading import below, table

_SPLITS = ("train", "dev", "test")
_NAME = re.compile(r"covost_v2\.([A-Za-z-]+)_([A-Za-z-]+)(?:\.(train|dev|test))?\.tsv")
Rows = dict[str, Entry]


def arguments(parser: ArgumentParser) -> None:
    """Options of its own."""
    parser.add_argument("--translations", type=Path, help="folder of CoVoST's .tsv files, or one of them")


def entries(source: Path, asked: Namespace, skipped: Skipped) -> Iterator[Entry]:
    """Each clip once, with its translations."""
    if not (source / "clips").is_dir():
        raise UserError(f"{source} is no Common Voice folder of a language: it has no clips/")
    where = asked.translations or source
    files = [where] if where.is_file() else sorted(where.glob("covost_v2.*_*.tsv"))
    named = [(path, match) for path in files if (match := _NAME.fullmatch(path.name))]
    if asked.translations and not named:
        raise UserError(f"{asked.translations}: no file is named covost_v2.SRC_TGT.tsv or covost_v2.SRC_TGT.SPLIT.tsv")
    found: Rows = {}
    split_files = {match.group(1, 2) for _, match in named if match.group(3)}
    for path, match in named:
        if match.group(3) or match.group(1, 2) not in split_files:  # else the download, which its splits stand for
            _add_translations(found, source, path, match, asked.lang, skipped)
    yield from found.values() if named else _common_voice(source, asked.lang or source.name, skipped)


def _common_voice(source: Path, lang: str, skipped: Skipped) -> Iterator[Entry]:
    paths = [source / f"{split}.tsv" for split in _SPLITS if (source / f"{split}.tsv").is_file()]
    for path in paths or [source / "validated.tsv"]:
        for where, row in table(path, skipped):
            entry = _entry(source, row, where, lang, path.stem if paths else "", skipped)
            if entry:
                yield entry


def _add_translations(
    found: Rows, source: Path, path: Path, match: re.Match[str], lang: str | None, skipped: Skipped
) -> None:
    spoken, target, split = match.groups()
    if lang and code(lang) != code(spoken):
        return
    sentences = None if split else {row.get("path", ""): row for _, row in table(source / "validated.tsv", skipped)}
    for where, row in table(path, skipped):
        if sentences is not None:
            row = {**sentences.get(row.get("path", ""), {}), **row}
        own = (split or row.get("split", "")).removesuffix("_covost")
        if own not in _SPLITS:  # clips that no split took
            skipped.add("no_split", where, f"split {own!r} is not one of {', '.join(_SPLITS)}")
            continue
        entry = _entry(source, row, where, spoken, own, skipped)
        if entry is None:
            continue
        known = found.setdefault(entry.id, entry)
        if known.split != entry.split:
            skipped.add(
                "two_splits", where, f"{entry.id!r} is in {known.split} by {known.where}, here in {entry.split}"
            )
            continue
        known.translate(target, _unescaped(row.get("translation", "")))


def _entry(
    source: Path, row: dict[str, str], where: str, lang: str, split: str, skipped: Skipped
) -> Entry | None:  # fmt: skip
    name = row.get("path", "")
    path = below(source / "clips", name if Path(name).suffix else f"{name}.mp3")
    if not name or path is None:
        skipped.add("outside" if name else "bad_row", where, f"path {name!r} is no name of a clip")
        return None
    text = _unescaped(row.get("sentence", ""))
    return Entry(path.stem, path, text, where, lang=lang, speaker=row.get("client_id", ""), split=split)


def _unescaped(text: str) -> str:
    """Cells are unquoted, a quotation mark may have a backslash before it; some releases quote cells that hold one."""
    if len(text) > 1 and text[0] == text[-1] == '"' and '""' in text[1:-1]:
        text = text[1:-1].replace('""', '"')
    return text.replace('\\"', '"')
