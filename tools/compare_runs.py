"""Whether two training runs are the same: step by step by their metrics, then by their last weights and moments.

    python -m tools.compare_runs RUN_A RUN_B [tolerance=1e-5]

Exit code 0: equal; 1: different; 2: there is nothing to compare. Without a tolerance numbers must be equal; with one,
|a - b| / |b| may reach it. What says which items a step took (items, epoch, padding) must always be equal; what says
how fast the machine was is not compared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sm_train.errors import UserError, run_command
from sm_train.train import checkpoint

METRICS = "metrics.jsonl"
USAGE = "usage: python -m tools.compare_runs RUN_A RUN_B [tolerance=1e-5]"
_EXACT = {"items", "epoch", "padding", "skipped"}
_OF_THE_MACHINE = ("_s", "_mb")  # units of time and memory
_TENSORS = {"weights": (checkpoint.WEIGHTS, ""), "first moments": ("moments.safetensors", "exp_avg."),
            "second moments": ("moments.safetensors", "exp_avg_sq.")}  # fmt: skip
Line = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Quantity:
    """One thing that both runs have, over all their common steps (tensors: of their last checkpoints)."""

    name: str
    compared: str
    """How much of it: 10 steps, 24 tensors."""
    largest: float
    """Largest relative difference; infinite where one is missing, not finite or no number."""
    at_step: int | None
    """Where that is; None if there is no difference."""
    first: tuple[int, str] | None
    """The first step at which it is beyond the tolerance, and both values; None if it never is."""

    @property
    def verdict(self) -> str:
        """A word or two."""
        if self.first:
            return f"different from step {self.first[0]}"
        return "within the tolerance" if self.largest else "equal"


@dataclass(frozen=True, slots=True)
class Comparison:
    """What :func:`compare` found; ``str()`` of it is the tool's output."""

    quantities: list[Quantity]
    findings: list[str] = field(default_factory=list)
    """Steps that are missing, doubled or out of order: each makes the runs different."""
    notes: list[str] = field(default_factory=list)
    """What could not be compared."""

    @property
    def equal(self) -> bool:
        """No finding, and no quantity beyond the tolerance."""
        return not self.findings and not any(quantity.first for quantity in self.quantities)

    @property
    def summary(self) -> str:
        """One line."""
        differing = [(q.first[0], i) for i, q in enumerate(self.quantities) if q.first]
        if differing:
            step, i = min(differing)
            quantity = self.quantities[i]
            assert quantity.first
            return f"different: first at step {step}: {quantity.name} {quantity.first[1]}"
        if self.findings:
            return f"different: {self.findings[0]}; the steps that both have are equal"
        largest = max((q.largest for q in self.quantities), default=0.0)
        extent = ", ".join(dict.fromkeys(q.compared for q in self.quantities if q.name in ("loss", "weights")))
        return f"equal: {extent}" + (f", relative differences up to {largest:.1e}" if largest else "")

    def __str__(self) -> str:
        rows = [("quantity", "compared", "largest difference", "at step", "verdict")]
        for q in self.quantities:
            at_step = "" if q.at_step is None else str(q.at_step)
            rows.append((q.name, q.compared, f"{q.largest:.1e}" if q.largest else "0", at_step, q.verdict))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join([*table, *[f"finding: {finding}" for finding in self.findings], *notes, self.summary])


def compare(a: Path, b: Path, tolerance: float) -> Comparison:
    """Compare two run folders.

    Args:
        tolerance: largest relative difference of a number; 0 for none.

    Raises:
        UserError: a folder or its metrics are missing, or no step is in both.
    """
    (lines_a, findings_a), (lines_b, findings_b) = _read(a), _read(b)
    common = sorted(lines_a.keys() & lines_b.keys())
    if not common:
        raise UserError(f"runs {a} and {b} have no step in common; give two runs of the same length")
    findings, notes = [*findings_a, *findings_b], []
    for one, other, name in ((lines_a, lines_b, a), (lines_b, lines_a, b)):
        if alone := sorted(one.keys() - other.keys()):
            findings.append(f"{_steps(alone)} in {name} alone")
    pairs = [(step, lines_a[step], lines_b[step]) for step in common]
    names = dict.fromkeys(["items", *(name for _, x, y in pairs for name in (*x, *y) if _is_compared(name))])
    quantities = []
    for name in names:
        of_name = [(s, x.get(name), y.get(name)) for s, x, y in pairs if name in x or name in y]
        if name == "items":
            of_name = [(s, x, y) for s, x, y in of_name if x is not None and y is not None]
            if len(of_name) < len(pairs):
                notes.append(f"item ids are compared at {len(of_name)} of {len(pairs)} steps: the others lack them")
        if of_name:
            quantities.append(_over_steps(name, of_name, 0.0 if name in _EXACT else tolerance))
    quantities += _checkpoints(a, b, tolerance, notes)
    return Comparison(quantities, findings, notes)


def _read(run: Path) -> tuple[dict[int, Line], list[str]]:
    """The line of each step, the last one where there are several, and what is wrong with their order."""
    path = run / METRICS
    if not run.is_dir():
        raise UserError(f"run folder {run} does not exist")
    if not path.is_file() or not path.stat().st_size:
        raise UserError(f"run folder {run} has no {METRICS}, or an empty one; give a run that took a step")
    lines: dict[int, Line] = {}
    doubled, unordered, findings = [], [], []
    newest = attempt = 0
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
            step = int(line["step"])
        except (ValueError, KeyError, TypeError):
            findings.append(f"line {number} of {path} is no step")
            continue
        (doubled if step in lines else unordered if step < newest else []).append(step)
        if line.get("attempt", attempt) < attempt:
            findings.append(f"attempt {line['attempt']} follows attempt {attempt} at step {step} of {run}")
        newest, attempt = max(newest, step), line.get("attempt", attempt)
        lines[step] = line
    missing = sorted(set(range(1, newest + 1)) - lines.keys())
    for steps, what in ((missing, "missing in"), (doubled, "more than once in"), (unordered, "out of order in")):
        if steps:
            findings.append(f"{_steps(steps)} {what} {run}")
    return lines, findings


def _steps(steps: Sequence[int], most: int = 5) -> str:
    shown = ", ".join(map(str, steps[:most])) + (f" and {len(steps) - most} more" if len(steps) > most else "")
    return f"step{'s' if len(steps) > 1 else ''} {shown}"


def _is_compared(name: str) -> bool:
    if name.startswith(("loss", "valid_")):
        return True
    return name not in ("step", "attempt") and not name.endswith(_OF_THE_MACHINE)


def _over_steps(name: str, values: Sequence[tuple[int, Any, Any]], tolerance: float) -> Quantity:
    largest, at_step, first = 0.0, None, None
    for step, a, b in values:
        difference = _relative(a, b)
        if difference > largest:
            largest, at_step = difference, step
        if difference > tolerance and first is None:
            first = (step, f"{'nothing' if a is None else repr(a)} against {'nothing' if b is None else repr(b)}")
    return Quantity(name, f"{len(values)} steps", largest, at_step, first)


def _relative(a: Any, b: Any) -> float:
    if a == b:
        return 0.0
    if not isinstance(a, int | float) or not isinstance(b, int | float) or b == 0:
        return math.inf
    return abs(a - b) / abs(b)


def _checkpoints(a: Path, b: Path, tolerance: float, notes: list[str]) -> list[Quantity]:
    """Weights and moments, if both runs' latest checkpoint is of the same step."""
    folders = [checkpoint.latest(run) for run in (a, b)]
    names = [folder.name if folder else "none" for folder in folders]
    if None in folders or names[0] != names[1]:
        notes.append(f"weights are not compared: the latest checkpoint of {a} is {names[0]}, of {b} {names[1]}")
        return []
    step = int(names[0].removeprefix("step-"))
    return [
        _tensors(name, *(folder / file for folder in folders if folder), prefix, step, tolerance)
        for name, (file, prefix) in _TENSORS.items()
    ]


def _tensors(name: str, path_a: Path, path_b: Path, prefix: str, step: int, tolerance: float) -> Quantity:
    """|a - b| / |b| over all tensors as one vector, in float64; 0.0 equals -0.0."""
    differing, off, size = [], 0.0, 0.0
    with safe_open(path_a, "pt") as file_a, safe_open(path_b, "pt") as file_b:
        keys = [{key for key in file.keys() if key.startswith(prefix)} for file in (file_a, file_b)]  # noqa: SIM118
        unlike = sorted(keys[0] ^ keys[1])
        for key in sorted(keys[0] & keys[1]):
            one, other = file_a.get_tensor(key), file_b.get_tensor(key)
            if (one.shape, one.dtype) != (other.shape, other.dtype):
                unlike.append(key)
                continue
            if not bool((one == other).all()):
                differing.append(key)
                off += float((one.double() - other.double()).square().sum())
            size += float(other.double().square().sum())
    if unlike:
        largest, what = math.inf, f"of one run has no like of {unlike[0]} in the other"
    else:
        largest = math.sqrt(off / size) if off and size else math.inf if differing else 0.0
        what = f"differ by {largest:.1e}, relative, in {len(differing)} tensors"
    largest = math.inf if math.isnan(largest) else largest
    return Quantity(
        name, f"{len(keys[0])} tensors", largest, step if largest else None,
        (step, what) if largest > tolerance else None,
    )  # fmt: skip


def main(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        return print(__doc__)
    folders = [Path(word) for word in argv if "=" not in word]
    settings = dict(word.split("=", 1) for word in argv if "=" in word)
    try:
        tolerance = float(settings.pop("tolerance", "0"))
    except ValueError:
        raise UserError(f"tolerance is no number; {USAGE}") from None
    if len(folders) != 2 or settings or not 0 <= tolerance < math.inf:
        raise UserError(USAGE)
    try:
        found = compare(*folders, tolerance)
    except (OSError, SafetensorError) as error:
        raise UserError(f"a checkpoint cannot be read: {error}") from None
    print(found)
    raise SystemExit(0 if found.equal else 1)


if __name__ == "__main__":
    run_command(main)
