"""Units of precompute: the audio of some utterances becomes one part of a shard set.

Four things go on at once: utterances are decoded ahead, in processes of their own; one batch is in the encoder; the
batches before it are made ready for the disk; the unit before is written.
Shape letters: S samples, T frames, E encoder width.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from sm_train.data import shards
from sm_train.data.audio import SAMPLE_RATE_HZ
from sm_train.data.samples import FEATS
from sm_train.data.store import Place
from sm_train.encoding.batches import cut_batches
from sm_train.encoding.decoders import Decoded, Decoder
from sm_train.encoding.gate import Gate
from sm_train.encoding.job import Abandoned, Job, row_of
from sm_train.models.speech import SpeechEncoder
from sm_train.records import Quarantined, Receipt, Unit, Utterance

_AUDIO_BYTES_S = 64_000  # of decoded audio, or of what the encoder is given instead
_ROW_BYTES = 2  # of a stored number

_Batch = tuple[Job, list[int], list[Future[Decoded | Quarantined]]]


class UnitEncoder:
    """Encodes units in one process; what an actor holds. Units are taken in the order in which they were given.

    The bytes of a part follow from the manifest, the encoder, the device type, the software and the thread count alone:
    batches are cut by the manifest's durations, and a bad utterance leaves its place in its batch as silence.

    Args:
        encoder: the frozen encoder.
        decoder: makes utterances ready for it.
        root: the shard set.
        batch_s: padded seconds of audio in one forward pass.
        max_duration_s: what an utterance may last; the place of a longer one is that long.
        limit_bytes: what is decoded, encoded and not yet written may take; the oldest unit always goes on.
        threads: of the encoder.
    """

    def __init__(
        self, encoder: SpeechEncoder, decoder: Decoder, root: Place, batch_s: float, max_duration_s: float,
        limit_bytes: int, threads: int = 1,
    ) -> None:  # fmt: skip
        self.encoder, self.decoder, self.root, self.threads = encoder, decoder, root, threads
        self.batch_s, self._longest_samples = batch_s, round(max_duration_s * SAMPLE_RATE_HZ)
        if encoder.longest_samples:
            self._longest_samples = min(self._longest_samples, encoder.longest_samples)
        self._gate = Gate(limit_bytes)
        self._open: set[Job] = set()
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._batches: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        self._after = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._feed, self._forward)]
        for thread in self._threads:
            thread.start()

    def submit(self, unit: Unit, is_probe: bool = False) -> Future[Receipt]:
        """Encode, write and commit one part; a part that is there already is left alone.

        Args:
            is_probe: go through the whole unit and write nothing.
        """
        job = Job(unit, Future(), is_probe, {row.id: row for row in unit.barred})
        self._open.add(job)
        job.future.add_done_callback(lambda _: self._open.discard(job))
        self._jobs.put(job)
        return job.future

    def encode_unit(self, unit: Unit) -> Receipt:
        """Encode, write and commit one part, and wait for it."""
        return self.submit(unit).result()

    def close(self, abandon: bool = False) -> None:
        """Finish what was given, and end; ``abandon``: begin no further batch and write no further part."""
        self._jobs.put(None)
        if abandon:
            for job in list(self._open):
                self._fail(job, Abandoned(f"{job.unit.part} was left, as its run ends"))
            self.decoder.close(abandon=True)
        for thread in self._threads:
            thread.join()
        self._after.shutdown()
        if not abandon:
            self.decoder.close()

    def _feed(self) -> None:
        """Cut units into batches and have them decoded, as far ahead as there is room."""
        while job := self._jobs.get():
            try:
                if not job.is_probe and shards.is_committed(self.root, job.unit.part):
                    self._after.submit(self._finish, job)
                    continue
                utterances = job.unit.utterances
                durations_s = [self._num_samples(u) / SAMPLE_RATE_HZ for u in utterances]
                batches = cut_batches(durations_s, self.batch_s, self.encoder.equal_length)
                job.batches_left = len(batches)
                for batch in batches:
                    self._gate.enter(job, round(sum(durations_s[i] for i in batch) * self._bytes_of_a_second))
                    if job.future.done():
                        break
                    self._batches.put((job, batch, [self._decoded(job, utterances[i]) for i in batch]))
            except BaseException as error:
                self._fail(job, error)
        self._batches.put(None)

    def _decoded(self, job: Job, utterance: Utterance) -> Future[Decoded | Quarantined]:
        if barred := job.barred.get(utterance.id):
            future: Future[Decoded | Quarantined] = Future()
            future.set_result(barred)
            return future
        return self.decoder.submit(utterance)

    @property
    def _bytes_of_a_second(self) -> float:
        return _AUDIO_BYTES_S + _ROW_BYTES * self.encoder.width * self.encoder.frame_rate_hz

    def _forward(self) -> None:
        """Run the encoder, batch by batch."""
        torch.set_num_threads(self.threads)  # of this thread's own pool, which its first convolution makes
        while work := self._batches.get():
            job, batch, futures = work
            if job.future.done():
                continue
            try:
                found = [future.result() for future in futures]
                places = {i: one for i, one in zip(batch, found, strict=True) if isinstance(one, Decoded)}
                job.bad |= {i: one for i, one in zip(batch, found, strict=True) if isinstance(one, Quarantined)}
                feats = self._encode(job, batch, places) if places else {}
                self._after.submit(self._store, job, places, feats)
            except BaseException as error:
                self._fail(job, error)

    def _encode(self, job: Job, batch: Sequence[int], places: dict[int, Decoded]) -> dict[int, NDArray[np.float32]]:
        """Features of those utterances of a batch that are there; the others' places are silence.

        Where a batch must be of one length, an utterance that the manifest gives another one is encoded alone.
        """
        counts = {i: self._num_samples(job.unit.utterances[i]) for i in batch}
        fits = {i for i in batch if i in places and places[i].num_samples == counts[i]}
        together = fits if self.encoder.equal_length else set(places)
        begun = time.perf_counter()
        feats: dict[int, NDArray[np.float32]] = {}
        if together:
            inputs = [places[i].inputs if i in together else self._silence(counts[i]) for i in batch]
            feats = dict(zip(batch, self.encoder.encode(inputs), strict=True))
        for i in places.keys() - together:
            (feats[i],) = self.encoder.encode([places[i].inputs])
        job.busy_s += time.perf_counter() - begun
        return {i: feats[i] for i in places}

    def _num_samples(self, utterance: Utterance) -> int:
        """By the manifest, within what the encoder takes."""
        count = round(min(utterance.duration_s * SAMPLE_RATE_HZ, self._longest_samples))
        return max(count, self.encoder.shortest_samples)

    def _silence(self, num_samples: int) -> NDArray[np.float32]:
        return self.encoder.inputs.prepare(np.zeros(num_samples, np.float32))

    def _store(self, job: Job, places: dict[int, Decoded], feats: dict[int, NDArray[np.float32]]) -> None:
        """Keep a batch's features as they are stored; after the last batch, write the part."""
        try:
            for i, feats_TE in feats.items():
                with np.errstate(over="ignore"):
                    stored_TE = feats_TE.astype(np.float16)
                if np.isfinite(stored_TE).all():
                    job.stored[i], job.num_samples[i] = stored_TE, places[i].num_samples
                else:
                    detail = "a feature is not finite as float16"
                    job.bad[i] = Quarantined(job.unit.utterances[i].id, "non_finite", detail)
            job.batches_left -= 1
            if job.batches_left == 0 and not job.future.done():
                self._finish(job)
        except BaseException as error:
            self._fail(job, error)

    def _finish(self, job: Job) -> None:
        """Write the part, unless it is there or only probed, and give its receipt."""
        try:
            part, begun = job.unit.part, time.perf_counter()
            if job.is_probe:
                counts, reasons = (len(job.stored), len(job.bad)), [row.reason for row in job.bad.values()]
            else:
                if not shards.is_committed(self.root, part):
                    self._write(job)
                done = shards.read_part(self.root, part)
                counts = len(done["rows"]), len(done["quarantined"])
                reasons = [row["reason"] for row in done["quarantined"]]
            now = time.perf_counter()
            receipt = Receipt(part, *counts, job.audio_s, job.busy_s, now - begun, now - job.begun, tuple(reasons))
        except BaseException as error:
            self._fail(job, error)
        else:
            self._gate.leave(job)
            job.future.set_result(receipt)

    def _write(self, job: Job) -> None:
        utterances, order = job.unit.utterances, sorted(job.stored)
        samples = ({"id": utterances[i].id, "feats": job.stored[i]} for i in order)
        rows = [row_of(utterances[i], job.num_samples[i], len(job.stored[i])) for i in order]
        quarantined = [job.bad[i] for i in sorted(job.bad)]
        shards.write_part(self.root, job.unit.part, FEATS, samples, rows, quarantined, self.encoder.facts)

    def _fail(self, job: Job, error: BaseException) -> None:
        if not job.future.done():
            job.future.set_exception(error)
        self._gate.leave(job)
