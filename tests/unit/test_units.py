from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from sm_train.data import shards
from sm_train.data.manifest import cut_units, read_manifest
from sm_train.encoding.batches import cut_batches
from sm_train.encoding.decoders import Decoded
from sm_train.encoding.job import Abandoned
from sm_train.encoding.units import UnitEncoder
from sm_train.models.speech import EncoderConfig
from sm_train.precompute import PrecomputeConfig, make_encoder
from sm_train.records import Unit, Utterance
from tests import builders, encoders
from tests.chaos import sets


def test_batches_hold_like_lengths_under_the_budget() -> None:
    assert cut_batches([1, 1, 1, 1], 2.0) == [[0, 1], [2, 3]]
    assert cut_batches([1, 3, 1, 1, 1], 3.0) == [[0, 2, 3], [4], [1]]
    assert cut_batches([1, 2, 1, 1.00001, 2], 9.0, equal_length=True) == [[0, 2, 3], [1, 4]]
    assert cut_batches([9, 9], 2.0) == [[0], [1]]
    assert cut_batches([], 2.0) == []
    durations = np.random.default_rng(0).uniform(0.5, 20, size=200).tolist()
    batches = cut_batches(durations, 60.0)
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    padded_s = sum(len(batch) * max(durations[i] for i in batch) for batch in batches)
    assert sum(durations) / padded_s > 0.9
    assert all(len(batch) * max(durations[i] for i in batch) <= 60.0 for batch in batches)


@pytest.fixture
def make(encoder_folder: Path, manifest: Path) -> Iterator[Callable[..., UnitEncoder]]:
    made = []

    def unit_encoder(root: Path, manifest: Path = manifest) -> UnitEncoder:
        frozen = EncoderConfig(path=str(encoder_folder), layer=2, device="cpu")
        made.append(make_encoder(PrecomputeConfig(str(manifest), str(root), frozen, batch_s=12.0)))
        return made[-1]

    yield unit_encoder
    for encoder in made:
        encoder.close()


def test_a_units_part_holds_every_utterance_in_order(make, manifest: Path, tmp_path: Path) -> None:
    (unit, *_) = cut_units(read_manifest(manifest), 8)
    encoder = make(tmp_path)
    receipt = encoder.encode_unit(unit)
    done = shards.read_part(tmp_path, unit.part)
    assert (receipt.num_committed, receipt.num_quarantined) == (8, 0)
    assert receipt.audio_s == pytest.approx(sum(u.duration_s for u in unit.utterances))
    assert [row["id"] for row in done["rows"]] == [u.id for u in unit.utterances]
    for row, utterance in zip(done["rows"], unit.utterances, strict=True):
        assert row["num_frames"] == encoder.encoder.num_frames(round(utterance.duration_s * 16_000))
    assert done["facts"]["width"] == 32


def test_a_part_that_is_there_is_left_alone(
    make, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (unit, *_) = cut_units(read_manifest(manifest), 4)
    encoder = make(tmp_path)
    first = encoder.encode_unit(unit)
    monkeypatch.setattr(encoder.encoder, "encode", None)  # a second forward pass would fail
    again = encoder.encode_unit(unit)
    assert (again.part, again.num_committed, again.audio_s) == (first.part, first.num_committed, first.audio_s)


def test_a_bad_utterance_leaves_its_place_blank(make, manifest: Path, tmp_path: Path) -> None:
    """The others' features are the same bits, whatever is wrong with it, a duration above the limit included."""
    rows = pq.read_table(manifest).to_pylist()[:8]
    rows[2]["audio"], rows[5]["text"] = "audio/absent.flac", ""
    bad = read_manifest(builders.write_manifest(tmp_path / "m.parquet", rows))
    good = read_manifest(manifest)[:8]
    for name, utterances in (("good", good), ("bad", bad)):
        make(tmp_path / name).encode_unit(Unit(0, tuple(utterances)))
    kept = {r["id"]: r["xxh3"] for r in shards.read_part(tmp_path / "good", "part-0000000")["rows"]}
    done = shards.read_part(tmp_path / "bad", "part-0000000")
    assert {r["id"]: r["reason"] for r in done["quarantined"]} == {
        good[2].id: "missing_audio",
        good[5].id: "empty_text",
    }
    assert {r["id"]: r["xxh3"] for r in done["rows"]} == {
        i: h for i, h in kept.items() if i not in (good[2].id, good[5].id)
    }


@pytest.mark.filterwarnings("error")
def test_the_shortest_utterance_that_makes_a_position_is_kept_and_a_shorter_one_is_not(make, tmp_path: Path) -> None:
    import soundfile

    encoder = make(tmp_path / "set", tmp_path / "m.parquet")
    edge = encoder.encoder.shortest_samples
    rows = []
    for count in (1, 399, 400, edge - 1, edge):
        soundfile.write(tmp_path / f"{count}.wav", builders.tones(np.random.default_rng(0), count / 16_000), 16_000)
        rows.append(builders.row(f"u{count}", f"{count}.wav", count / 16_000, "hello"))
    unit = Unit(0, tuple(read_manifest(builders.write_manifest(tmp_path / "m.parquet", rows))))
    encoder.encode_unit(unit)
    done = shards.read_part(tmp_path / "set", unit.part)
    assert [(r["id"], r["num_frames"]) for r in done["rows"]] == [(f"u{edge}", 4)]
    assert {r["reason"] for r in done["quarantined"]} == {"too_short"}


def test_what_does_not_fit_the_encoders_window_is_quarantined(tmp_path: Path) -> None:
    import soundfile

    folder = encoders.whisper(tmp_path / "whisper", seconds=2)
    rows = []
    for count in (32_000, 32_001):
        soundfile.write(tmp_path / f"{count}.wav", builders.tones(np.random.default_rng(0), count / 16_000), 16_000)
        rows.append(builders.row(f"u{count}", f"{count}.wav", count / 16_000, "hello"))
    unit = Unit(0, tuple(read_manifest(builders.write_manifest(tmp_path / "m.parquet", rows))))
    frozen = EncoderConfig(path=str(folder), layer=2, device="cpu")
    encoder = make_encoder(PrecomputeConfig(str(tmp_path / "m.parquet"), str(tmp_path / "set"), frozen, batch_s=12.0))
    encoder.encode_unit(unit)
    encoder.close()
    done = shards.read_part(tmp_path / "set", unit.part)
    assert [(r["id"], r["num_frames"]) for r in done["rows"]] == [("u32000", 50)]
    assert [(r["id"], r["reason"]) for r in done["quarantined"]] == [("u32001", "too_long")]


def test_features_that_overflow_float16_are_quarantined(make, manifest: Path, tmp_path: Path) -> None:
    (unit, *_) = cut_units(read_manifest(manifest), 3)
    encoder = make(tmp_path)
    inner = encoder.encoder.encode
    encoder.encoder.encode = lambda inputs: [f * 1e6 if i == 1 else f for i, f in enumerate(inner(inputs))]
    encoder.encode_unit(unit)
    (bad,) = shards.read_part(tmp_path, unit.part)["quarantined"]
    second = cut_batches([u.duration_s for u in unit.utterances], 12.0)[0][1]
    assert (bad["id"], bad["reason"]) == (unit.utterances[second].id, "non_finite")


def unit_of(count: int) -> Unit:
    rows = [builders.row(f"u{i}", "good", 1.0 + i, "hello") for i in range(count)]
    return Unit(0, tuple(Utterance(**row) for row in rows))


def test_an_error_anywhere_is_the_units_and_the_next_one_goes_on(tmp_path: Path) -> None:
    class Broken(sets.Tones):
        def encode(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
            return [None for _ in inputs] if len(inputs[0]) == 2 else super().encode(inputs)

    encoder = UnitEncoder(Broken(), sets.Names(False), tmp_path, 1.0, 60.0, 1)
    first, second = unit_of(3), Unit(1, tuple(replace(u, id=u.id + "xx") for u in unit_of(3).utterances))
    first = Unit(0, tuple(replace(u, id="ab") for u in first.utterances[:1]))
    encoder.encoder.inputs = SimpleNamespace(prepare=lambda samples_S: samples_S)
    encoder.decoder.submit = lambda utterance: done(Decoded(np.ones(len(utterance.id), np.float32), 160))
    with pytest.raises(AttributeError):
        encoder.submit(first).result(timeout=20)
    assert encoder.submit(second).result(timeout=20).num_committed == 3
    encoder.close()


def done(one: Decoded) -> Future[Decoded]:
    future: Future[Decoded] = Future()
    future.set_result(one)
    return future


def test_closing_at_once_gives_up_what_is_open(tmp_path: Path) -> None:
    asked: list[Future[Decoded]] = []

    class Slow:
        def submit(self, utterance: Utterance) -> Future[Decoded]:
            asked.append(Future())
            return asked[-1]

        def close(self, abandon: bool = False) -> None:
            for future in asked:
                future.set_exception(RuntimeError("closed"))

    encoder = UnitEncoder(sets.Tones(), Slow(), tmp_path, 1.0, 60.0, 1)
    futures = [encoder.submit(unit) for unit in (unit_of(3), Unit(1, unit_of(2).utterances))]
    while not asked:
        time.sleep(0.01)
    encoder.close(abandon=True)
    for future in futures:
        with pytest.raises(Abandoned, match="was left, as its run ends"):
            future.result(timeout=0)
    assert list(tmp_path.iterdir()) == []
