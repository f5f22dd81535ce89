"""Turn a corpus on disk into a manifest and instructions.

    python -m tools.corpora FORMAT SOURCE OUT [--option value ...]

writes OUT/manifest.parquet and OUT/instructions.parquet; ``python -m tools.corpora FORMAT --help`` says what FORMAT is.
Bad rows are counted and left out, never the good ones beside them. The same source gives the same bytes.
"""

from __future__ import annotations

import os
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from sm_train.errors import UserError, run_command
from tools.corpora import (
    covost,
    europarl_st,
    folder,
    hf,
    kaldi,
    lhotse,
    librispeech,
    librisqa,
    nemo,
    spoken_squad,
    tsv,
    writer,
)
from tools.corpora.entries import Importer, Skipped

FORMATS: Mapping[str, Importer] = {
    "librispeech": librispeech,
    "covost": covost,
    "europarl_st": europarl_st,
    "spoken_squad": spoken_squad,
    "librisqa": librisqa,
    "kaldi": kaldi,
    "lhotse": lhotse,
    "nemo": nemo,
    "hf": hf,
    "tsv": tsv,
    "folder": folder,
}


def main(argv: list[str], formats: Mapping[str, Importer] = FORMATS) -> None:
    """Import one corpus; an importer of one's own comes as ``formats={"name": importer}``."""
    asked = parser_of(formats).parse_args(argv)
    if not asked.source.exists():
        raise UserError(f"source {asked.source} does not exist")
    skipped = Skipped()
    found = formats[asked.format].entries(asked.source, asked, skipped)
    print(writer.write(found, asked.out, asked, skipped), flush=True)


def parser_of(formats: Mapping[str, Importer]) -> ArgumentParser:
    """The command line: a subcommand for each format, options that all have, and its own."""
    top, _, more = (__doc__ or "").partition("\n")
    parser = ArgumentParser(
        "python -m tools.corpora", description=top, epilog=more, formatter_class=RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    for name, importer in formats.items():
        text = importer.__doc__ or ""
        one = commands.add_parser(
            name,
            help=text.partition("\n")[0].replace("%", "%%"),
            description=text,
            formatter_class=RawDescriptionHelpFormatter,
        )
        one.add_argument("source", type=Path, metavar="SOURCE", help="folder or file of the corpus")
        one.add_argument("out", type=Path, metavar="OUT", help="folder for manifest.parquet and instructions.parquet")
        one.add_argument("--lang", help="language of the speech where the corpus does not say, a code as en")
        one.add_argument("--split", help="split where the corpus does not say (train)")
        one.add_argument(
            "--speaker-from", metavar="REGEX",
            help="speaker where the corpus does not say: the group of a regular expression on the id, as ^([^-]+)-",
        )  # fmt: skip
        one.add_argument(
            "--absolute", action="store_true",
            help="absolute audio paths; else they are relative to OUT where the audio lies below OUT's parent folder",
        )  # fmt: skip
        one.add_argument(
            "--workers", type=int, default=min(32, 4 * (os.cpu_count() or 1)), help="threads that read audio headers"
        )
        importer.arguments(one)
    return parser


if __name__ == "__main__":
    run_command(partial(main, formats=FORMATS))
