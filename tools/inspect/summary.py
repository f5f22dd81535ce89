"""A set in figures, and those figures in words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sm_train import files
from sm_train.data import shards
from sm_train.data.lengths import num_positions
from sm_train.data.target_set import TABLE, UTTERANCES, require_covered
from sm_train.errors import UserError, printable
from tools.inspect import GB, Opened, bars
from tools.verify import MALFORMED, reason, short

_EXAMPLES, _BINS = 3, 12
_IN_WORDS = (
    "encoder", "encoder_revision", "encoder_hash", "layer", "pool", "frame_rate_hz", "width", "dtype", "compute_dtype",
    "device_type", "threads", "software",
)  # fmt: skip
_OF_SET = ("num_committed", "num_quarantined", "num_parts", "part_hashes", "table_hashes")


def summarise(found: Opened, targets: Sequence[str]) -> dict[str, Any]:
    """What is in a set: plain values, ready for JSON."""
    lengths_s = found.numbers("duration_s") if found.columns else np.zeros(0)
    names = ("split", "lang", "speaker")
    split, lang, speaker = (found.column(name) if found.columns else [] for name in names)
    return {
        "set": found.uri,
        "complete": found.is_complete,
        "contract": found.contract,
        "committed": len(lengths_s),
        "quarantined": len(found.quarantine),
        "hours": float(lengths_s.sum()) / 3600,
        "hours_by_split": _hours(split, lengths_s),
        "hours_by_lang": _hours(lang, lengths_s),
        "speakers": len(set(speaker)),
        "parts": found.num_parts,
        "unfinished_parts": found.num_unfinished,
        "shards": len(found.shard_bytes),
        "bytes": sum(found.shard_bytes),
        "largest_shard_bytes": max(found.shard_bytes, default=0),
        "quarantine": _quarantine(found.quarantine),
        "duration_s": _spread(lengths_s, _edges(lengths_s)),
        "targets": [_target(found, name) for name in targets],
    }


def _hours(of: Sequence[Any], lengths_s: NDArray[np.float64]) -> dict[str, dict[str, float]]:
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for name, length_s in zip(of, lengths_s.tolist(), strict=True):
        sums[str(name)][0] += length_s / 3600
        sums[str(name)][1] += 1
    return {name: {"hours": hours, "utterances": count} for name, (hours, count) in sorted(sums.items())}


def _quarantine(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    by_reason: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        by_reason[str(row.get("reason"))].append({"id": str(row.get("id")), "detail": str(row.get("detail"))})
    order = sorted(by_reason, key=lambda name: (-len(by_reason[name]), name))
    return {name: {"count": len(by_reason[name]), "examples": by_reason[name][:_EXAMPLES]} for name in order}


def _edges(values: NDArray[np.float64]) -> list[float]:
    """Up to a dozen bins from 0 to the largest value, of a width that reads well."""
    most = float(values.max(initial=0.0))
    least = max(most, 1e-3) / _BINS
    decade = 10.0 ** np.floor(np.log10(least))
    width = next(decade * k for k in (1, 2, 5, 10) if decade * k >= least * (1 - 1e-9))
    return [float(width * i) for i in range(int(most / width) + 2)]


def _spread(values: NDArray[np.float64], edges: Sequence[float]) -> dict[str, Any]:
    counts = np.histogram(values, edges)[0].tolist()
    if not len(values):
        return {"edges": list(edges), "counts": counts}
    quantiles = dict(zip(("least", "median", "p99", "most"), np.quantile(values, (0, 0.5, 0.99, 1)), strict=True))
    return {
        **{name: float(value) for name, value in quantiles.items()},
        "mean": float(values.mean()), "edges": list(edges), "counts": counts,
    }  # fmt: skip


def _target(found: Opened, name: str) -> dict[str, Any]:
    """One target set; what cannot be read of it is said in ``problem``."""
    root = found.root / "targets" / name
    if not shards.is_complete(root):
        return {"name": name, "complete": False, "parts": len(shards.parts_of(root))}
    try:
        contract = files.read_object(root / shards.DATASET)
        table = shards.read_table(root, TABLE)
        tokens = np.array(table.column("num_tokens").to_pylist(), np.int64)
        frames = found.numbers("num_frames").astype(np.int64)
        require_covered(contract["covers"], shards.read_table(found.root, UTTERANCES), root)
        of_position = tokens / np.maximum(num_positions(frames[table.column("utterance").to_pylist()]), 1)
        quarantine = shards.read_table(root, shards.QUARANTINE).to_pylist()
    except UserError as error:
        return {"name": name, "complete": True, "problem": str(error)}
    except MALFORMED as error:
        return {"name": name, "complete": True, "problem": reason(error)}
    covered = contract["covers"]["num_utterances"]
    return {
        "name": name,
        "complete": True,
        "contract": contract,
        "covered": covered,
        "share_covered": covered / max(len(frames), 1),
        "utterances": len(tokens),
        "tokens": int(tokens.sum()),
        "tokens_per_position": _spread(of_position, [i / 10 for i in range(11)]),
        "share_above_0.9": float((of_position > 0.9).mean()) if len(tokens) else 0.0,
        "quarantine": _quarantine(quarantine),
    }


def in_words(facts: Mapping[str, Any]) -> list[str]:
    """The lines of the summary."""
    contract = facts["contract"]
    state = "complete" if facts["complete"] else "NOT complete: run its precompute command again; so far there are"
    lines = [f"{printable(facts['set'], 300)}: {state}", *_contract(contract), ""]
    unfinished = f", {facts['unfinished_parts']} begun" if facts["unfinished_parts"] else ""
    lines += [
        f"{facts['committed']:,} utterances, {facts['hours']:.2f} h, {facts['speakers']:,} speakers; "
        f"{facts['quarantined']:,} quarantined",
        f"{facts['parts']:,} parts{unfinished}, {facts['shards']:,} shards, {facts['bytes'] / GB:.3f} GB; "
        f"the largest shard {facts['largest_shard_bytes'] / 1e6:.1f} MB",
    ]
    for title, key in (("split", "hours_by_split"), ("language", "hours_by_lang")):
        lines.append(f"by {title}:")
        lines += [
            f"  {short(name) or '(none)':<16} {of['hours']:>10.2f} h {of['utterances']:>10,}"
            for name, of in facts[key].items()
        ]
    lines += _quarantine_lines(facts["quarantine"])
    if facts["committed"]:
        lines += _spread_lines("duration", facts["duration_s"], " s")
    for target in facts["targets"]:
        lines += ["", *_target_lines(target)]
    return lines if facts["targets"] else [*lines, "", "no target set"]


def _contract(contract: Mapping[str, Any]) -> list[str]:
    def said(name: str) -> str:
        return printable(contract.get(name), 120)

    software = contract.get("software")
    versions = ", ".join(f"{short(k)} {short(v)}" for k, v in software.items()) if isinstance(software, dict) else ""
    revision = f" at {said('encoder_revision')}" if contract.get("encoder_revision") else ""
    rest = {k: v for k, v in contract.items() if k not in (*_IN_WORDS, *_OF_SET)}
    return [
        f"  features  hidden_states[{said('layer')}] of {said('encoder')}{revision} (weights {said('encoder_hash')}), "
        f"the mean of every {said('pool')} frames",
        f"  stored    {said('frame_rate_hz')} frames a second of width {said('width')}, as {said('dtype')}",
        f"  computed  in {said('compute_dtype')} on {said('device_type')}, {said('threads')} thread(s); {versions}",
        f"  settings  {', '.join(f'{short(k)} {short(v)}' for k, v in rest.items())}",
    ]


def _quarantine_lines(quarantine: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, of in quarantine.items():
        lines.append(f"quarantined as {short(name)}: {of['count']:,}")
        lines += [f"  {short(row['id'])}: {printable(row['detail'], 160)}" for row in of["examples"]]
    return lines


def _spread_lines(what: str, of: Mapping[str, Any], unit: str) -> list[str]:
    numbers = ", ".join(f"{name} {of[name]:.2f}{unit}" for name in ("least", "median", "mean", "p99", "most"))
    return [f"{what}: {numbers}", *(f"  {line}" for line in bars(of["counts"], of["edges"], unit))]


def _target_lines(target: Mapping[str, Any]) -> list[str]:
    name = short(target["name"])
    if not target["complete"]:
        return [f"targets/{name}: NOT complete, {target['parts']} parts; run the command that makes it again"]
    if "problem" in target:
        return [f"targets/{name}: {printable(target['problem'], 300)}"]
    contract = target["contract"]
    said = {key: short(contract.get(key)) for key in ("llm", "pad_token", "pad_id", "normaliser", "num_rows", "width")}
    lines = [
        f"targets/{name}: {said['llm']}, pad {said['pad_token']} ({said['pad_id']}), normaliser {said['normaliser']}, "
        f"{said['num_rows']} rows of width {said['width']} ({short(contract.get('dtype'))})",
        f"of {target['covered']:,} utterances ({100 * target['share_covered']:.2f}%) {target['utterances']:,} have "
        f"targets, {target['tokens']:,} tokens",
    ]
    if target["utterances"]:
        lines += _spread_lines("tokens of a position (above 1: too_many_tokens)", target["tokens_per_position"], "")
    return lines + _quarantine_lines(target["quarantine"])
