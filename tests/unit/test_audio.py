from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from sm_train.data import audio
from sm_train.errors import UserError
from sm_train.records import Utterance
from tests import builders, storage


def tone(rate_hz: int, seconds: float = 1.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(rate_hz * seconds)) / rate_hz)


def reason(path: Path, start_s: float = 0.0, duration_s: float = 1.0) -> str:
    with pytest.raises(audio.BadAudio) as error:
        audio.load(path, start_s, duration_s)
    assert str(path) in str(error.value)
    return error.value.reason


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_every_sample_format_gives_the_same_float32(tmp_path: Path, subtype: str) -> None:
    soundfile.write(tmp_path / "a.wav", tone(16_000), 16_000, subtype=subtype)
    samples_S = audio.load(tmp_path / "a.wav")
    assert samples_S.dtype == np.float32
    np.testing.assert_allclose(samples_S, tone(16_000), atol=1e-2 if subtype == "PCM_U8" else 1e-4)


@pytest.mark.parametrize("rate_hz", [8_000, 22_050, 44_100, 48_000])
def test_other_rates_and_stereo_become_mono_at_16_khz(tmp_path: Path, rate_hz: int) -> None:
    stereo = np.stack([tone(rate_hz) * 1.5, tone(rate_hz) * 0.5], axis=1)
    soundfile.write(tmp_path / "a.flac", stereo, rate_hz)
    samples_S = audio.load(tmp_path / "a.flac", 0.0, 1.0)
    assert samples_S.shape == (16_000,)
    assert np.abs(samples_S - tone(16_000))[800:-800].max() < 2e-3


def test_a_segment_is_cut_where_the_manifest_says(tmp_path: Path) -> None:
    samples = np.linspace(-0.5, 0.5, 32_000)
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    segment_S = audio.load(tmp_path / "a.wav", 0.5, 0.25)
    np.testing.assert_allclose(segment_S, samples[8_000:12_000], atol=1e-6)
    assert len(audio.load(tmp_path / "a.wav", 1.5)) == 8_000


def test_each_kind_of_bad_file_has_its_reason(tmp_path: Path) -> None:
    good = tmp_path / "good.flac"
    soundfile.write(good, 0.1 * np.random.default_rng(0).normal(size=32_000), 16_000)
    whole = good.read_bytes()
    assert reason(tmp_path / "absent.flac") == "missing_audio"
    assert reason(tmp_path) == "missing_audio"
    assert reason(good, start_s=5.0) == "truncated"
    assert reason(good, duration_s=2.2) == "truncated"
    assert len(audio.load(good, 0.0, 2.05)) == 32_000  # within the tolerance
    for cut in (0, 10, 42, 100, 1000, len(whole) // 2, len(whole) - 5):
        (tmp_path / "cut.flac").write_bytes(whole[:cut])
        assert reason(tmp_path / "cut.flac", duration_s=2.0) in ("undecodable", "truncated"), cut
    (tmp_path / "noise.flac").write_bytes(np.random.default_rng(0).bytes(5000))
    assert reason(tmp_path / "noise.flac") == "undecodable"
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16_000)
    assert reason(tmp_path / "none.wav") == "empty_audio"
    soundfile.write(tmp_path / "one.wav", np.full(1, 0.5), 48_000)
    assert reason(tmp_path / "one.wav", duration_s=0.001) == "empty_audio"
    for bad in (np.nan, np.inf):
        soundfile.write(tmp_path / "bad.wav", np.r_[tone(16_000), bad], 16_000, subtype="FLOAT")
        assert reason(tmp_path / "bad.wav", duration_s=1.1) == "non_finite"


def test_a_wav_that_lost_its_end_is_truncated(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(16_000), 16_000)
    whole = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "a.wav").write_bytes(whole[: len(whole) // 2])
    assert reason(tmp_path / "a.wav") == "truncated"


def test_rows_are_refused_for_what_they_hold(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(16_000), 16_000)
    soundfile.write(tmp_path / "quiet.wav", np.full(16_000, 1e-5), 16_000, subtype="FLOAT")

    def check(name: str = "a.wav", duration_s: float = 1.0, text: str = "hello") -> str:
        utterance = Utterance(**builders.row("u", name, duration_s, text))
        try:
            return str(len(audio.load_utterance(utterance, tmp_path, max_duration_s=2.0, silence_dbfs=-80.0)))
        except audio.BadAudio as error:
            return error.reason

    assert check() == "16000"
    assert check(text=" \t") == "empty_text"
    assert check(duration_s=2.5) == "too_long"
    assert check("quiet.wav") == "silent"
    assert check("absent.wav", duration_s=1e9) == "too_long"  # by the manifest: nothing that long is ever decoded


def test_a_header_says_how_long_a_file_is_or_why_not(tmp_path: Path) -> None:
    stereo = np.stack([tone(8_000, 1.5)] * 2, axis=1)
    soundfile.write(tmp_path / "a.flac", stereo, 8_000)
    assert audio.info(tmp_path / "a.flac") == audio.Header(1.5, 8_000, 2)
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16_000)
    (tmp_path / "a.m4a").write_bytes(b"\0\0\0\x20ftypM4A ")
    (tmp_path / "a.raw").write_bytes(b"samples")
    for name, reason, says in (
        ("absent.wav", "missing_audio", "does not exist"),
        ("x" * 5000, "missing_audio", "too long"),
        ("none.wav", "empty_audio", "no samples"),
        ("a.raw", "undecodable", "a.raw"),
        ("a.m4a", "undecodable", "reads no .m4a; convert it: ffmpeg -i IN.m4a -ac 1 -ar 16000 OUT.flac"),
    ):
        with pytest.raises(audio.BadAudio) as error:
            audio.info(tmp_path / name)
        assert error.value.reason == reason
        assert says in str(error.value)


@pytest.fixture
def fresh_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio, "_given_up", {})
    for cache in (audio._open_bucket, audio._fetch):
        cache.cache_clear()


def test_objects_are_decoded_as_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_storage: None) -> None:
    monkeypatch.setattr("sm_train.data.remote._PAUSE_S", 0.001)
    corpus = tmp_path / "corpus"
    (corpus / "audio").mkdir(parents=True)
    soundfile.write(corpus / "audio/a b.flac", tone(16_000), 16_000)
    soundfile.write(corpus / "audio/stereo.wav", np.stack([tone(44_100)] * 2, axis=1), 44_100)
    (corpus / "audio/noise.flac").write_bytes(np.random.default_rng(0).bytes(5000))
    (corpus / "audio/none.flac").write_bytes(b"")

    def load(name: str, root: str = "s3://bucket/c", duration_s: float = 1.0) -> np.ndarray | str:
        utterance = Utterance(**builders.row("u", name, duration_s, "hello"))
        try:
            return audio.load_utterance(utterance, root, 60.0, -80.0)
        except audio.BadAudio as error:
            return error.reason if name in str(error) else str(error)

    with storage.s3_server(monkeypatch) as server:
        storage.upload(server, corpus, "bucket/c")
        for name in ("audio/a b.flac", "audio/stereo.wav"):
            local = audio.load(corpus / name, 0.0, 1.0)
            assert np.array_equal(load(name), local)
            assert np.array_equal(load(f"s3://bucket/c/{name}", root=str(tmp_path)), local)
            assert np.array_equal(load(str(corpus / name)), local)  # an absolute path stays one
        assert load("audio/noise.flac") == "undecodable"
        assert load("audio/none.flac") == "undecodable"
        assert load("audio/absent.flac") == "missing_audio"
        assert load("audio") == "missing_audio"
        assert load("audio/a b.flac", duration_s=2.0) == "truncated"
        with pytest.raises(UserError, match="s3://nobucket: the bucket does not exist"):
            load("s3://nobucket/a.flac")
        monkeypatch.setattr(audio, "OBJECT_LIMIT_BYTES", 1000)
        audio._fetch.cache_clear()
        assert load("audio/stereo.wav") == "too_large"


def test_a_storage_that_fails_is_tried_again_and_then_stops_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_storage: None
) -> None:
    monkeypatch.setattr("sm_train.data.remote._PAUSE_S", 0.001)
    soundfile.write(tmp_path / "a.wav", tone(16_000), 16_000)
    address, asked = "s3://bucket/c/a.wav", []
    with storage.s3_server(monkeypatch) as server:
        storage.upload(server, tmp_path, "bucket/c")
        for faults in (["503"], ["cut_down", "500"], ["", "", "cut_down"]):
            audio._open_bucket.cache_clear()
            audio._fetch.cache_clear()
            plan = iter(faults)
            with storage.bad_connection(monkeypatch, lambda *_, plan=plan: next(plan, "")):
                assert np.array_equal(audio.load(address), audio.load(tmp_path / "a.wav"))
        audio._open_bucket.cache_clear()
        audio._fetch.cache_clear()
        with storage.bad_connection(monkeypatch, lambda *_: asked.append(1) or "503"):
            for _ in range(5):  # it is not asked again for every utterance that is on its way
                with pytest.raises(UserError, match=rf"{address} cannot be fetched, 4 attempts failed: .*503"):
                    audio.load(address)
        assert len(asked) == 8
        monkeypatch.setattr(audio, "_GIVEN_UP_S", 0)
        audio._given_up.clear()
        with pytest.raises(UserError, match="cannot be fetched"):
            audio.load(address)  # nobody listens there any more
        audio._open_bucket.cache_clear()
        assert np.array_equal(audio.load(address), audio.load(tmp_path / "a.wav"))
