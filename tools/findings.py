"""Findings: what is wrong with which rows, counted by reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SHOWN = 10
KINDS = ("refused", "quarantined", "noted")
"""A reader would refuse the whole file | precompute would leave the row out | for information."""

UNREAD = "remote_audio"
"""The reason that stands for rows whose audio was not looked at."""


@dataclass(slots=True)
class Finding:
    """One thing that is wrong with some rows."""

    kind: str
    """refused | quarantined | noted"""
    reason: str
    count: int = 0
    rows: list[int] = field(default_factory=list)
    """The first ones, from 1."""
    detail: str = ""
    """Of the first one."""


class Report:
    """What was found, and what there is."""

    def __init__(self) -> None:
        self.findings: dict[str, Finding] = {}
        self.facts: dict[str, Any] = {}

    def add(self, kind: str, reason: str, row: int, detail: str) -> None:
        """Count a row."""
        finding = self.findings.setdefault(reason, Finding(kind, reason, detail=detail))
        finding.count += 1
        if len(finding.rows) < SHOWN:
            finding.rows.append(row)

    @property
    def ok(self) -> bool:
        """Nothing would be refused or left out."""
        return all(finding.kind == "noted" for finding in self.findings.values())

    def as_mapping(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        names = Finding.__slots__
        found = [{name: getattr(finding, name) for name in names} for finding in self._sorted()]
        return {"ok": self.ok, **self.facts, "findings": found}

    def __str__(self) -> str:
        facts = [f"{name}: {_shown(value)}" for name, value in self.facts.items()]
        lines = []
        for finding in self._sorted():
            rows = ", ".join(map(str, finding.rows)) + (", ..." if finding.count > len(finding.rows) else "")
            lines.append(f"{finding.kind}: {finding.count} {finding.reason}, row {rows} ({finding.detail})")
        which = "every row whose audio was read" if UNREAD in self.findings else "every row"
        verdict = f"{which} would be committed" if self.ok else "not ready"
        return "\n".join([*facts, *lines, verdict])

    def _sorted(self) -> list[Finding]:
        order = KINDS
        return sorted(self.findings.values(), key=lambda f: (order.index(f.kind), -f.count, f.reason))


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name or '(none)'} {_shown(one)}" for name, one in value.items()) or "none"
    return f"{value:.2f}" if isinstance(value, float) else f"{value}"
