"""What the report shows besides numbers: utterances to listen to, and a picture of mapped positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sm_train.scoring.answers import Utterances
from sm_train.scoring.pictures import Projection, project
from sm_train.scoring.report import Example
from sm_train.scoring.scores import Hypothesis
from sm_train.scoring.systems import Mapped

_PICTURED_UTTERANCES = 40


def examples(
    all_rows: Sequence[Mapping[str, Any]], hypotheses: Sequence[Hypothesis], audio_root: str | None, of_each_split: int
) -> list[Example]:
    """A few of some utterances of each split, with what was said about them to one prompt of each task and group."""
    said: dict[str, list[tuple[str, str, str, str, str]]] = {}
    first: dict[tuple[str, str, str, str], str] = {}
    for h in hypotheses:
        task = f"st-{h.target_lang}" if h.task == "st" else h.task
        if first.setdefault((h.id, task, h.group, h.reference), h.prompt) != h.prompt:
            continue
        said.setdefault(h.id, []).append((h.system, task, h.prompt, h.reference, h.hypothesis))
    shown: list[Example] = []
    for split in dict.fromkeys(row["split"] for row in all_rows):
        rows = [row for row in all_rows if row["split"] == split]
        for row in rows[:: max(len(rows) // max(of_each_split, 1), 1)][:of_each_split]:
            audio = _playable(row, Path(audio_root)) if audio_root else None
            shown.append(Example(row["ordinal"], row["id"], split, row["text"], audio, said.get(row["id"], [])))
    return shown


def rows_of(hypotheses: Sequence[Hypothesis]) -> list[dict[str, Any]]:
    """What hypotheses alone tell of their utterances; the text of one is there where its transcript was asked for."""
    rows: dict[str, dict[str, Any]] = {}
    for h in hypotheses:
        row = rows.setdefault(h.id, {"ordinal": h.ordinal, "id": h.id, "split": h.split, "text": ""})
        if h.task == "asr":
            row["text"] = h.reference
    return sorted(rows.values(), key=lambda row: row["ordinal"])


def _playable(row: Mapping[str, Any], root: Path) -> Path | None:
    """The file of an utterance that is a file of its own below ``root``; a segment of a longer one has no player."""
    path = (root / row["audio"]).resolve()
    return path if path.is_relative_to(root.resolve()) and path.is_file() and row["start_s"] == 0 else None


def picture(utterances: Utterances, mapped: Mapped) -> Projection:
    """The mapped positions of some utterances among the token embeddings that the corpus uses."""
    rows = utterances.rows[:_PICTURED_UTTERANCES]
    positions = [mapped.positions(utterances.heard(row["ordinal"], row["text"])) for row in rows]
    mapped_ND = np.concatenate([p.float().cpu().numpy() for p in positions])
    targets = mapped.targets
    labels = [targets.text(np.array([row])) or "∅" for row in range(len(targets.token_ids))]
    labels[targets.pad_row] = "pad"
    return project(mapped_ND, targets.rows_RD.float().numpy(), labels, targets.pad_row)
