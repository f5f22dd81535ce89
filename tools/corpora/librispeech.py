"""LibriSpeech: LibriSpeech/SPLIT/SPEAKER/CHAPTER/*.trans.txt beside .flac files.

train-clean-100, train-clean-360 and train-other-500 become the split train, dev-clean and dev-other the split dev;
test-clean and test-other keep their names.
Layout: https://www.openslr.org/12 and its README.TXT.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

from sm_train.errors import UserError
from tools.corpora.entries import Entry, Skipped
from tools.corpora.reading import below, lines

SPLITS = {
    "train-clean-100": "train", "train-clean-360": "train", "train-other-500": "train",
    "dev-clean": "dev", "dev-other": "dev", "test-clean": "test-clean", "test-other": "test-other",
}  # fmt: skip


def arguments(parser: ArgumentParser) -> None:
    """Options of its own."""
    parser.add_argument("--own-splits", action="store_true", help="keep the corpus's own names, as train-clean-100")


def entries(source: Path, asked: Namespace, skipped: Skipped) -> Iterator[Entry]:
    """The utterances of every split that is there."""
    root = source / "LibriSpeech" if (source / "LibriSpeech").is_dir() else source
    splits = [split for split in SPLITS if (root / split).is_dir()]
    if not splits:
        raise UserError(f"{source} is no LibriSpeech: it has none of the folders {', '.join(SPLITS)}")
    for split in splits:
        for transcripts in sorted((root / split).glob("*/*/*.trans.txt")):
            chapter, seen = transcripts.parent, set()
            for where, line in lines(transcripts, skipped):
                identity, _, text = line.partition(" ")
                path = below(chapter, f"{identity}.flac")
                if path is None:
                    skipped.add("outside", where, f"{identity!r} is no name of a file")
                    continue
                seen.add(path)
                name = split if asked.own_splits else SPLITS[split]
                yield Entry(identity, path, text, where, lang="en", speaker=chapter.parent.name, split=name)
            for path in sorted(set(chapter.glob("*.flac")) - seen):
                skipped.add("no_text", f"{split}/{path.name}", f"{transcripts.name} has no line for it")
