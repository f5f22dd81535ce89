"""lhotse: a file of cuts (cuts.jsonl, .jsonl.gz), or a folder of cuts, or of recordings with their supervisions.

Each supervision of a MonoCut becomes an utterance under the supervision's id. Audio must be a plain file: a source
that is a command, an address or an archive is left out, as are recordings with transforms (speed, resampling) and
mixed cuts. Without --split the split is what lhotse's names end in (librispeech_cuts_dev-clean.jsonl.gz: dev-clean).
Relative paths start at --audio-root, by default at the folder that lhotse was run in: the present one.
Layout: https://lhotse.readthedocs.io/en/latest/corpus.html and cuts.html
"""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sm_train.errors import UserError
from tools.corpora.entries import Entry, Skipped
from tools.corpora.reading import json_lines, number

Row = dict[str, Any]
_NAMED = re.compile(r"(?:cuts|supervisions)_([\w.-]+?)\.jsonl")


def arguments(parser: ArgumentParser) -> None:
    """Options of its own."""
    parser.add_argument("--audio-root", type=Path, default=Path(), help="folder that relative audio paths start at")


def entries(source: Path, asked: Namespace, skipped: Skipped) -> Iterator[Entry]:
    """The supervisions of all cuts."""
    for where, cut in _cuts(source, skipped):
        try:
            found = list(_utterances(cut, where, asked.audio_root, asked.split or _split_of(where)))
        except _Refused as refused:
            skipped.add(refused.reason, where, str(refused))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            skipped.add("bad_row", where, f"no cut of lhotse: {error!r}")
        else:
            yield from found


def _split_of(where: str) -> str:
    match = _NAMED.search(where)
    return match.group(1) if match else ""


class _Refused(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def _cuts(source: Path, skipped: Skipped) -> Iterator[tuple[str, Row]]:
    """Cuts as they are, or recordings with their supervisions as such cuts."""
    if source.is_file():
        yield from json_lines(source, skipped)
        return
    paths = sorted([*source.glob("*.jsonl"), *source.glob("*.jsonl.gz")])
    cuts = [path for path in paths if "cuts" in path.name]
    pairs = [(path, path.with_name(path.name.replace("recordings", "supervisions"))) for path in paths]
    pairs = [(recordings, spoken) for recordings, spoken in pairs if recordings != spoken and spoken.is_file()]
    if not cuts and not pairs:
        raise UserError(
            f"{source} is of no lhotse layout: no *cuts*.jsonl(.gz), no *recordings* with its *supervisions*"
        )
    for path in cuts:
        yield from json_lines(path, skipped)
    for recordings, spoken in () if cuts else pairs:
        known = {str(row.get("id")): row for _, row in json_lines(recordings, skipped)}
        for where, row in json_lines(spoken, skipped):
            recording = known.get(str(row.get("recording_id")))
            if recording is None:
                skipped.add("missing_audio", where, f"{recordings.name} has no recording {row.get('recording_id')!r}")
                continue
            yield where, {"type": "MonoCut", "start": 0.0, "recording": recording, "supervisions": [row]}


def _utterances(cut: Row, where: str, root: Path, split: str) -> Iterator[Entry]:
    if cut.get("type", "MonoCut") != "MonoCut":
        raise _Refused("cut_type", f"a {cut['type']} is no plain piece of one recording")
    recording = cut["recording"]
    if recording.get("transforms"):
        raise _Refused("transforms", f"recording {recording['id']!r} is changed when it is read; save the audio first")
    sources = recording["sources"]
    if len(sources) != 1 or sources[0].get("type", "file") != "file":
        kinds = ", ".join(str(one.get("type")) for one in sources)
        raise _Refused("source_type", f"sources of the type {kinds}: only one plain file is read, and nothing is run")
    if not cut["supervisions"]:
        raise _Refused("empty_text", f"cut {cut.get('id')!r} has no supervision")
    for spoken in cut["supervisions"]:
        yield Entry(
            id=str(spoken["id"]),
            audio=root / str(sources[0]["source"]),
            text=str(spoken.get("text") or ""),
            where=where,
            start_s=round(number(cut["start"]) + number(spoken["start"]), 9),
            duration_s=number(spoken["duration"]),
            lang=str(spoken.get("language") or ""),
            speaker=str(spoken.get("speaker") or ""),
            split=split,
            one_channel=True,
        )
