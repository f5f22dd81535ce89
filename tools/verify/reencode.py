"""Units encoded again, into a folder aside, and compared with the set.

Features may depend on the batch they were in, so whole units go through the same batches again: on the same device
type, threads and software every sample must have the same xxh3. Rounds of mended audio are units as any other; what
was mended is kept out of the part that had quarantined it, as it was then.
Shape letters: T frames, E encoder width.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sm_train import requeue
from sm_train.data import manifest, mds, shards, store
from sm_train.data.manifest import manifest_hash
from sm_train.data.samples import FEATS
from sm_train.errors import UserError, printable
from sm_train.models.speech import EncoderConfig
from sm_train.precompute import PrecomputeConfig, describe, environment, make_encoder
from sm_train.records import Quarantined, Unit, Utterance
from tools.verify import Problem, differing, inside, reason, short

TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 3e-3}
"""The distance of an utterance's features, relative to their norm, that is allowed on other devices or software."""
_BARRED = ("crashes_decoder", "crashes_encoder", "times_out")  # ended a process once: not tried again
_NOT_COMPARED = ("encoder", "encoder_revision", "manifest_hash")
_REMEDY = (
    "find out which of the two is right, the set or this machine; if the set is wrong, remove it and make it again"
)


@dataclass
class Compared:
    """What encoding again has shown."""

    num_utterances: int = 0
    num_equal: int = 0
    largest: float = 0.0
    """The largest difference of one number."""
    relative: float = 0.0
    """The largest distance of an utterance's features, relative to their norm."""
    elsewhere: list[str] = field(default_factory=list)
    """How this machine differs from that of the contract."""
    problems: list[Problem] = field(default_factory=list)

    def __str__(self) -> str:
        how = f"not bit for bit, since {'; '.join(self.elsewhere)}" if self.elsewhere else "bit for bit"
        return (
            f"{self.num_utterances} utterances encoded again and compared {how}: {self.num_equal} are equal, the "
            f"largest difference of a number is {self.largest:.3g}, of an utterance {self.relative:.3g} of its norm"
        )


def encode_again(
    root: Path, dataset: Mapping[str, Any], utterances: Sequence[Utterance], source: str, encoder: str, count: int,
    seed: int,
) -> Compared:  # fmt: skip
    """Encode some units again, chosen by ``seed``, until they hold at least ``count`` utterances.

    Args:
        source: the manifest's path or address.
        encoder: the folder of the encoder's checkpoint.

    Raises:
        UserError: the set's contract is not one that this version's precompute can state.
    """
    try:
        cfg = _config(dataset, source, encoder)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{root / shards.DATASET}: the contract cannot be followed ({error})") from None
    stated = describe(cfg, manifest_hash(utterances))
    names = [name for name in stated if name not in _NOT_COMPARED]
    if odd := differing(stated, dict(dataset), names):
        raise UserError(f"{root / shards.DATASET}: {odd[0]} as this version's precompute would have it")
    here = environment(cfg)
    found = Compared(elsewhere=differing(here, dict(dataset), here))
    units = _units(root, utterances, cfg.unit_utterances)
    last_part = {u.id: unit.part for unit in units for u in unit.utterances}
    random.Random(seed).shuffle(units)
    with tempfile.TemporaryDirectory() as aside:
        made = make_encoder(PrecomputeConfig(**{**vars(cfg), "out": aside}))
        try:
            for unit in units:
                if found.num_utterances >= count:
                    break
                barred = [
                    Quarantined(**row)
                    for row in shards.read_part(root, unit.part)["quarantined"]
                    if row["reason"] in _BARRED or last_part[row["id"]] != unit.part
                ]
                made.encode_unit(replace(unit, barred=tuple(barred)))
                _compare(found, root, Path(aside), unit.part, dataset)
        finally:
            made.close()
    return found


def _units(root: Path, utterances: Sequence[Utterance], unit_utterances: int) -> list[Unit]:
    """The units, those of rounds too, whose parts are there: a round may be under way."""
    try:
        units = manifest.cut_units(utterances, unit_utterances)
        units = requeue.with_rounds(store.at(root), units, unit_utterances)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{root}: its requeue files cannot be followed ({reason(error)}); restore them") from None
    there = shards.committed(root, [unit.part for unit in units])
    return [unit for unit in units if unit.part in there]


def _config(dataset: Mapping[str, Any], source: str, encoder: str) -> PrecomputeConfig:
    device = "cuda" if dataset["device_type"] == "cuda" and _has_gpu() else "cpu"
    frozen = EncoderConfig(
        path=encoder,
        layer=dataset["layer"],
        pool=dataset["pool"],
        dtype=dataset["compute_dtype"],
        device=device,
        batching=dataset["batching"],
    )
    return PrecomputeConfig(
        manifest=source, out="", encoder=frozen, unit_utterances=dataset["unit_utterances"],
        batch_s=dataset["batch_s"], max_duration_s=dataset["max_duration_s"], silence_dbfs=dataset["silence_dbfs"],
        threads=dataset["threads"],
    )  # fmt: skip


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _compare(found: Compared, root: Path, aside: Path, name: str, dataset: Mapping[str, Any]) -> None:
    ours, theirs = shards.read_part(aside, name), shards.read_part(root, name)
    place = f"{root}/{name}"
    facts = differing(ours["facts"], theirs["facts"], ours["facts"])
    for said in facts:
        remedy = f"give the encoder that the set names ({dataset['encoder']}, revision {dataset['encoder_revision']})"
        found.problems.append(Problem(place, f"{said} as --encoder gives", remedy))
    if facts:
        return
    reasons = [{row["id"]: row["reason"] for row in done["quarantined"]} for done in (ours, theirs)]
    for said in differing(*reasons, {**reasons[0], **reasons[1]}):
        found.problems.append(Problem(place, f"quarantined now and then: {printable(said, 200)}", _REMEDY))
    rows = {row["id"]: row for row in ours["rows"]}
    limit = TOLERANCE[dataset["compute_dtype"]]
    for row in theirs["rows"]:
        if row["id"] not in rows:
            continue
        found.num_utterances += 1
        again = rows[row["id"]]
        if again["xxh3"] == row["xxh3"]:
            found.num_equal += 1
            continue
        ours_TE, theirs_TE = _feats(aside, name, again), _feats(root, name, row)
        said = f"its features are of shape {theirs_TE.shape}, now {ours_TE.shape}"
        if ours_TE.shape == theirs_TE.shape:
            apart_TE = np.abs(ours_TE - theirs_TE)
            relative = float(np.linalg.norm(apart_TE) / max(np.linalg.norm(ours_TE), 1e-30))
            found.largest = max(found.largest, float(apart_TE.max()))
            found.relative = max(found.relative, relative)
            if found.elsewhere and relative <= limit:
                continue
            said = f"its features are another machine's by {relative:.3g} of their norm; {limit:g} is allowed"
            if not found.elsewhere:
                said = f"its features differ by up to {float(apart_TE.max()):.3g}; they must be the same bits here"
        found.problems.append(Problem(place, f"{short(row['id'])!r}: {said}", _REMEDY))


def _feats(root: Path, part: str, row: Mapping[str, Any]) -> NDArray[np.float32]:
    with mds.Shard(inside(root, f"{part}/{row['shard']}"), FEATS) as shard:
        feats_TE: NDArray[np.float32] = shard.decode(shard.read(row["index"]))["feats"].astype(np.float32)
    return feats_TE
