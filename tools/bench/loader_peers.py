"""Other loaders, each on the benchmark's data in its own format, collated to the same padded tensor; none verifies.

Shape letters: B items, T frames, E feature width.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

T, E, FRAMES = 308, 1024, 10_000
ITEMS = FRAMES // T


def padded(arrays: Sequence[np.ndarray]) -> torch.Tensor:
    """What the other loaders collate with: the same tensor as ours."""
    feats_BTE = torch.zeros(len(arrays), max(map(len, arrays)), arrays[0].shape[1], dtype=torch.float16)
    for feats_TE, array in zip(feats_BTE.numpy(), arrays, strict=True):
        feats_TE[: len(array)] = array
    return feats_BTE


def frames_of(batches: Iterable[torch.Tensor]) -> int:
    """Frames of all batches; they hold no padding here."""
    return sum(batch.shape[0] * batch.shape[1] for batch in batches)


def mosaic(root: Path, workers: int) -> Callable[[], int]:
    """StreamingDataset and StreamingDataLoader on our own files, unverified as they are."""
    sys.modules.setdefault("streaming.vision", types.ModuleType("streaming.vision"))
    from streaming import StreamingDataLoader, StreamingDataset

    local = root.with_name(f"mosaic-{workers}")
    local.symlink_to(root)  # a folder serves one dataset at a time
    dataset = StreamingDataset(local=str(local), shuffle=False, batch_size=ITEMS)
    loader = StreamingDataLoader(
        dataset, batch_size=ITEMS, num_workers=workers, persistent_workers=workers > 0,
        collate_fn=lambda samples: padded([sample["feats"] for sample in samples]),
    )  # fmt: skip
    return lambda: frames_of(loader)


def webdataset(root: Path, feats: Callable[[int], np.ndarray], count: int) -> Callable[[int], Callable[[], int]]:
    """Raw arrays in tars of 64 MB."""
    import webdataset as wds

    root.mkdir()
    with wds.ShardWriter(str(root / "%05d.tar"), maxsize=1 << 26, verbose=0) as writer:
        for i in range(count):
            writer.write({"__key__": f"utt-{i:06d}", "feats": feats(i).tobytes()})
    urls = sorted(map(str, root.glob("*.tar")))

    def made(workers: int) -> Callable[[], int]:
        data = wds.WebDataset(urls, shardshuffle=False)
        data = data.map(lambda sample: np.frombuffer(sample["feats"], np.float16).reshape(-1, E))
        data = data.batched(ITEMS, collation_fn=padded)
        loader = DataLoader(data, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
        return lambda: frames_of(loader)

    return made


def lhotse(root: Path, feats: Callable[[int], np.ndarray], count: int) -> Callable[[int], Callable[[], int]]:
    """Shar with arrays as numpy, a dynamic sampler of 400 padded seconds."""
    from lhotse import CutSet, Features, MonoCut, SupervisionSegment
    from lhotse.dataset import DynamicCutSampler, IterableDatasetWrapper
    from lhotse.features.io import MemoryRawWriter
    from lhotse.shar import SharWriter

    root.mkdir()
    with SharWriter(str(root), fields={"features": "numpy"}, shard_size=100) as writer, MemoryRawWriter() as memory:
        for i in range(count):
            name = f"utt-{i:06d}"
            stored = Features(
                type="speech", num_frames=T, num_features=E, frame_shift=0.04, sampling_rate=16_000, start=0,
                duration=T * 0.04, storage_type=memory.name, storage_path="", storage_key=memory.write(name, feats(i)),
                channels=0,
            )  # fmt: skip
            said = SupervisionSegment(name, name, 0, T * 0.04)
            writer.write(MonoCut(name, 0, T * 0.04, 0, features=stored, supervisions=[said]))

    class Padded(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __getitem__(self, cuts: Any) -> torch.Tensor:
            return padded([cut.load_features() for cut in cuts])

    def made(workers: int) -> Callable[[], int]:
        cuts = CutSet.from_shar(in_dir=str(root), split_for_dataloading=workers > 0, seed=0)
        sampler = DynamicCutSampler(cuts, max_cuts=ITEMS, shuffle=False, rank=0, world_size=1)
        loader = DataLoader(IterableDatasetWrapper(Padded(), sampler), batch_size=None, num_workers=workers)
        return lambda: frames_of(loader)

    return made
