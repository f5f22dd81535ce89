"""What a world comes to: table.md, table.json, claims.md and pictures."""

from __future__ import annotations

import json
from pathlib import Path

from sm_train import files
from sm_train.runlog import revision
from tools.reproduce import claims, pictures, table
from tools.reproduce.compute import Compute
from tools.reproduce.results import Results


def write(found: Results, root: Path, name: str, command: str, to: Path | None) -> list[Path]:
    """Write everything under ``root`` and, if asked, the same into another folder; the paths of what is written."""
    if not found.scores:
        print("nothing is evaluated yet: no table")
        return []
    texts = {
        "table.md": table.page(found, name, command),
        "claims.md": claims.page(found, name, command),
        "table.json": json.dumps(_values(found, command), indent=1, ensure_ascii=False) + "\n",
        **pictures.all_of(found, root),
    }
    for folder in filter(None, (root, to)):
        for file, text in texts.items():
            files.write_text(folder / file, text)
    return [folder / file for folder in filter(None, (root, to)) for file in texts]


def _values(found: Results, command: str) -> dict[str, object]:
    """Everything, for other programs."""
    judged = [
        {
            "says": claim.says, "a": claim.a, "b": claim.b, "overall": claims.overall(verdicts),
            "on": [{"column": v.place.metric, "voices": v.voices, "prompts": v.place.prompts, "says": v.says,
                    "difference": v.found.value, "low": v.found.low, "high": v.found.high} for v in verdicts],
        }
        for claim in found.world.claims for verdicts in [claims.judge(claim, found)]
    ]  # fmt: skip
    costs = {row: {"own": _cost(found.own[row]), "whole": _cost(found.whole[row])} for row in found.own}
    return {"command": command, "code": revision(), "scores": found.entries(), "compute": costs, "claims": judged}


def _cost(spent: Compute) -> dict[str, float]:
    return {"llm_tokens": spent.llm_tokens, "flop": spent.flop, "minutes": spent.minutes}
