"""The same features by two other ways: a plain loop in one process, and Ray Data's map_batches.

Both do what a person would write first: read a file, let transformers extract, run the encoder on a batch of
neighbours, pool, write. Neither verifies, quarantines or can go on after a kill.
Shape letters: B utterances, S samples, T frames, E encoder width.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray

from sm_train.data.samples import FEATS
from sm_train.models.checkpoints import first_output
from sm_train.models.speech import mean_pool
from sm_train.records import Utterance


class Plain:
    """The encoder as transformers gives it: all layers up to one, frames averaged in pairs."""

    def __init__(self, folder: str, layer: int, threads: int) -> None:
        from transformers import SeamlessM4TFeatureExtractor
        from transformers.models.seamless_m4t_v2.modeling_seamless_m4t_v2 import SeamlessM4Tv2SpeechEncoder

        torch.set_num_threads(threads)
        rename = {r"^speech_encoder\.": ""}
        self.model = SeamlessM4Tv2SpeechEncoder.from_pretrained(folder, key_mapping=rename).float().eval()
        assert len(self.model.encoder.layers) == layer
        self.extractor = SeamlessM4TFeatureExtractor.from_pretrained(folder)

    @torch.inference_mode()
    def __call__(self, audio: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float16]]:
        """Features [T, E] of some utterances [S]."""
        inputs = self.extractor(list(audio), sampling_rate=16_000, return_tensors="pt")
        mask_BT = inputs["attention_mask"]
        hidden = first_output(self.model.feature_projection(inputs["input_features"]))
        hidden_BTE = first_output(self.model.encoder(hidden, attention_mask=mask_BT))
        counts = mask_BT.sum(dim=1).tolist()
        return [mean_pool(hidden_BTE[i, :n], 2).numpy().astype(np.float16) for i, n in enumerate(counts)]


def extractor(folder: str) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """What transformers makes of one utterance [S]: [T, F]."""
    from transformers import SeamlessM4TFeatureExtractor

    made = SeamlessM4TFeatureExtractor.from_pretrained(folder)
    return lambda samples_S: _unpadded(made([samples_S], sampling_rate=16_000, return_tensors="np"))


def _unpadded(inputs: Any) -> NDArray[np.float32]:
    found: NDArray[np.float32] = inputs["input_features"][0][: int(inputs["attention_mask"][0].sum())]
    return found


def mosaic_writer(out: Path) -> Any:
    """MosaicML's MDSWriter, as this environment lets it be imported."""
    sys.modules.setdefault("streaming.vision", types.ModuleType("streaming.vision"))
    from streaming import MDSWriter

    return MDSWriter(out=str(out), columns=FEATS)


def plain_loop(
    utterances: Sequence[Utterance], root: Path, encoder: str, layer: int, batch: int, threads: int, out: Path
) -> None:
    """One process, one batch after the other, into MDS shards; all of the machine's threads in the encoder."""
    plain = Plain(encoder, layer, threads)

    def samples() -> Iterator[dict[str, Any]]:
        for begin in range(0, len(utterances), batch):
            some = utterances[begin : begin + batch]
            audio = [soundfile.read(root / u.audio, dtype="float32")[0] for u in some]
            for utterance, feats_TE in zip(some, plain(audio), strict=True):
                yield {"id": utterance.id, "feats": feats_TE}

    with mosaic_writer(out) as writer:
        for sample in samples():
            writer.write(sample)


def ray_data(
    utterances: Sequence[Utterance], root: Path, encoder: str, layer: int, batch: int, actors: int, out: Path
) -> None:
    """Ray Data: reading in its own tasks, the encoder in ``actors`` actors of one thread, written as Parquet."""
    import ray

    class Encode:
        def __init__(self) -> None:
            self.plain = Plain(encoder, layer, 1)

        def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
            audio = [soundfile.read(root / name, dtype="float32")[0] for name in rows["audio"]]
            feats = self.plain(audio)
            stored = [feats_TE.tobytes() for feats_TE in feats]
            return {"id": rows["id"], "feats": stored, "num_frames": [len(feats_TE) for feats_TE in feats]}

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own = {"include_dashboard": False, "_node_ip_address": "127.0.0.1", "log_to_driver": False}
    ray.init(address="local", num_cpus=actors, object_store_memory=1 << 30, logging_level="error", **own)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = [{"id": u.id, "audio": u.audio} for u in utterances]
        found = ray.data.from_items(rows, override_num_blocks=max(len(rows) // 256, actors))
        settings: dict[str, Any] = {"compute": ray.data.ActorPoolStrategy(size=actors), "num_cpus": 1}
        found.map_batches(Encode, batch_size=batch, **settings).write_parquet(str(out))
    finally:
        ray.shutdown()
