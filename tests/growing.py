"""A complete shard set that gains utterances, as an append of parts makes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sm_train import files
from sm_train.data import shards

_OF_COMMIT = ("num_committed", "num_quarantined", "num_parts", "part_hashes", "table_hashes")


def grow(root: Path, texts: Sequence[str], num_frames: Sequence[int]) -> list[str]:
    """Append a part of random features, an utterance a text; returns their ids. Old rows stay as they are."""
    dataset = files.read_json(root / shards.DATASET)
    parts = sorted(path.parent.name for path in root.glob(f"part-*/{shards.DONE}"))
    facts = shards.read_part(root, parts[0])["facts"]
    first, rng = dataset["num_committed"], np.random.default_rng(len(parts))
    width = facts.get("width", 8)
    ids = [f"new-{first + i}" for i in range(len(texts))]
    feats = [rng.normal(size=(frames, width)).astype(np.float16) for frames in num_frames]
    samples = [{"id": id, "feats": feats_TE} for id, feats_TE in zip(ids, feats, strict=True)]
    rows = [
        {"id": id, "split": "train", "lang": "en", "speaker": "s", "duration_s": frames / 25, "num_frames": frames,
         "text": text, "audio": f"{id}.flac", "start_s": 0.0}
        for id, text, frames in zip(ids, texts, num_frames, strict=True)
    ]  # fmt: skip
    part = f"part-{len(parts):07d}"
    shards.write_part(root, part, {"id": "str", "feats": "ndarray:float16"}, samples, rows, [], facts)
    contract = {name: value for name, value in dataset.items() if name not in _OF_COMMIT}
    shards.commit(root, [*parts, part], contract, "utterances.parquet")
    return ids
