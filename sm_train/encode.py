"""One unit of work of precompute: the audio of some utterances becomes one part of a shard set.

Shape letters: S samples, T frames, E encoder width.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sm_train.data import audio, shards
from sm_train.data.samples import FEATS
from sm_train.models.speech import EncoderConfig, SpeechEncoder
from sm_train.records import Quarantined, Receipt, Unit, Utterance


class UnitEncoder:
    """Encodes units in one process; what an actor holds.

    The bytes of a part follow from the manifest, the encoder, the device type, the software and the thread count alone:
    batches are cut by the manifest's durations, and a bad utterance leaves its place in its batch as silence.
    """

    def __init__(
        self, encoder: EncoderConfig, root: Path, audio_root: Path, batch_s: float, max_duration_s: float,
        silence_dbfs: float, threads: int,
    ) -> None:  # fmt: skip
        torch.set_num_threads(threads)
        self.root, self.audio_root = root, audio_root
        self.batch_s, self.max_duration_s, self.silence_dbfs = batch_s, max_duration_s, silence_dbfs
        self.encoder = SpeechEncoder(encoder)
        self.encoder.check_alone_equals_padded()
        self.shortest_samples = self.encoder.shortest_samples

    def encode_unit(self, unit: Unit) -> Receipt:
        """Encode, write and commit one part; a part that is there already is left alone."""
        start = time.perf_counter()
        if not shards.is_committed(self.root, unit.part):
            samples, rows, quarantined = self._encode(unit)
            facts = {"encoder_hash": self.encoder.weights_hash, "width": self.encoder.width}
            shards.write_part(self.root, unit.part, FEATS, samples, rows, quarantined, facts)
        done = shards.read_part(self.root, unit.part)
        audio_s = sum(u.duration_s for u in unit.utterances)
        encode_s = time.perf_counter() - start
        return Receipt(unit.part, len(done["rows"]), len(done["quarantined"]), audio_s, encode_s)

    def _encode(self, unit: Unit) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[Quarantined]]:
        samples, rows, bad = [], [], {}
        for batch in cut_batches([u.duration_s for u in unit.utterances], self.batch_s):
            utterances = [unit.utterances[i] for i in batch]
            audio_BS, problems = self._load(utterances)
            bad.update(problems)
            for utterance, feats_TE, samples_S in zip(
                utterances, self.encoder.encode_audio(audio_BS), audio_BS, strict=True
            ):
                if utterance.id in bad:
                    continue
                with np.errstate(over="ignore"):
                    stored_TE = feats_TE.astype(np.float16)
                if not np.isfinite(stored_TE).all():
                    detail = "a feature is not finite as float16"
                    bad[utterance.id] = Quarantined(utterance.id, "non_finite", detail)
                    continue
                samples.append({"id": utterance.id, "feats": stored_TE})
                rows.append(_row(utterance, len(samples_S), len(stored_TE)))
        return samples, rows, [bad[u.id] for u in unit.utterances if u.id in bad]

    def _load(self, utterances: Sequence[Utterance]) -> tuple[list[NDArray[np.float32]], dict[str, Quarantined]]:
        loaded, problems = [], {}
        for utterance in utterances:
            try:
                samples_S = audio.load_utterance(utterance, self.audio_root, self.max_duration_s, self.silence_dbfs)
                if len(samples_S) < self.shortest_samples:
                    detail = f"{len(samples_S)} samples; {self.shortest_samples} make one position"
                    raise audio.BadAudio("too_short", detail)
                longest = self.encoder.longest_samples
                if longest and len(samples_S) > longest:
                    raise audio.BadAudio("too_long", f"{len(samples_S)} samples; the encoder takes {longest}")
            except audio.BadAudio as error:
                problems[utterance.id] = Quarantined(utterance.id, error.reason, str(error))
                samples_S = self._silence(utterance)
            loaded.append(samples_S)
        return loaded, problems

    def _silence(self, utterance: Utterance) -> NDArray[np.float32]:
        duration_s = min(utterance.duration_s, self.max_duration_s)
        num_samples = max(round(duration_s * audio.SAMPLE_RATE_HZ), self.shortest_samples)
        return np.zeros(min(num_samples, self.encoder.longest_samples or num_samples), np.float32)


def cut_batches(durations_s: Sequence[float], batch_s: float) -> list[list[int]]:
    """Indices in batches of neighbours whose padded length, count times longest, stays within ``batch_s`` seconds.

    The order of the utterances is kept; one that is longer than ``batch_s`` is a batch alone.
    """
    batches: list[list[int]] = []
    longest_s = 0.0
    for i, duration_s in enumerate(durations_s):
        longest_s = max(longest_s, duration_s)
        if not batches or longest_s * (len(batches[-1]) + 1) > batch_s:
            batches.append([])
            longest_s = duration_s
        batches[-1].append(i)
    return batches


def _row(utterance: Utterance, num_samples: int, num_frames: int) -> dict[str, object]:
    return {
        "id": utterance.id,
        "split": utterance.split,
        "lang": utterance.lang,
        "speaker": utterance.speaker,
        "duration_s": num_samples / audio.SAMPLE_RATE_HZ,
        "num_frames": num_frames,
        "text": utterance.text,
        "audio": utterance.audio,
        "start_s": utterance.start_s,
    }
