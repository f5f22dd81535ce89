"""Speech of the miniature world, and the corpus command."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from sm_train.errors import UserError

pytest.importorskip("espeakng_loader")

from tools.miniature import corpus
from tools.miniature.speech import HELD_OUT_VOICES, TRAIN_VOICES, SpeechError, Voice, synthesise, utter

TEXT = "the old farmer buys a red car"
CONFIG = Path(__file__).parents[2] / "configs" / "miniature" / "easy.yaml"


def make(out: Path, **values: object) -> None:
    sizes = {"train": 6, "valid": 2, "test": 2, "test_voices": 3, "workers": 1, **values}
    corpus.main([str(CONFIG), f"out={out}", *(f"{name}={value}" for name, value in sizes.items())])


def bytes_of(out: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file() and path.suffix != ".yaml"
    }


@pytest.mark.parametrize("voice", [TRAIN_VOICES[2], HELD_OUT_VOICES[0]], ids=lambda voice: voice.name)
def test_samples_do_not_depend_on_history(voice: Voice) -> None:
    first = synthesise(TEXT, voice, 150, 50)
    synthesise("something else", TRAIN_VOICES[1], 170, 40)
    np.testing.assert_array_equal(first, synthesise(TEXT, voice, 150, 50))
    assert first.dtype == np.float32
    assert 1.5 < first.size / 16_000 < 4


def test_every_voice_sounds_different() -> None:
    voices = TRAIN_VOICES + HELD_OUT_VOICES
    assert len({synthesise(TEXT, voice, 160, 50).tobytes() for voice in voices}) == len(voices)
    assert not set(TRAIN_VOICES) & set(HELD_OUT_VOICES)
    assert len(TRAIN_VOICES) >= 10


def test_unknown_voice() -> None:
    with pytest.raises(SpeechError, match="nobody"):
        synthesise(TEXT, Voice("nobody", 50), 150, 50)


def test_noise_has_the_ratio_asked_for() -> None:
    clean = utter(TEXT, TRAIN_VOICES[0], np.random.default_rng(1)).astype(np.float64)
    noisy = utter(TEXT, TRAIN_VOICES[0], np.random.default_rng(1), noise_snr_db=10.0).astype(np.float64)
    noise = noisy - clean * (clean @ noisy) / (clean @ clean)
    ratio_db = 10 * np.log10((np.mean(noisy**2) - np.mean(noise**2)) / np.mean(noise**2))
    assert abs(ratio_db - 10) < 0.3


def test_corpus_is_complete_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow.parquet as parquet
    import soundfile

    make(tmp_path)
    manifest = parquet.read_table(tmp_path / "manifest.parquet").to_pylist()
    tasks = parquet.read_table(tmp_path / "instructions.parquet").to_pylist()
    assert [row["id"] for row in manifest][:7] == [*(f"train-{index:06d}" for index in range(6)), "valid-000000"]
    assert len({row["text"] for row in manifest}) == 13
    assert {row["speaker"] for row in manifest if row["split"] == "test_voices"} <= {v.name for v in HELD_OUT_VOICES}
    for row in manifest:
        info = soundfile.info(tmp_path / row["audio"])
        assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
        assert info.frames / 16_000 == row["duration_s"]
    assert len(tasks) == 4 * 13
    assert {(row["task"], row["target_lang"]) for row in tasks} == {
        ("asr", "en"),
        ("st", "fr"),
        ("st", "de"),
        ("sqa", "en"),
    }
    assert all(("question" in json.loads(row["variables"])) == (row["task"] == "sqa") for row in tasks)
    capsys.readouterr()
    make(tmp_path, workers=2)
    assert "nothing to do" in capsys.readouterr().out


def test_interrupted_corpus_ends_the_same(tmp_path: Path) -> None:
    make(tmp_path / "whole")
    make(tmp_path / "cut")
    for name in ("_DONE.json", "manifest.parquet", "audio/train-000002.flac", "audio/test-000001.flac"):
        (tmp_path / "cut" / name).unlink()
    (tmp_path / "cut" / "audio" / ".train-000002.1.flac").write_bytes(b"half")
    kept = os.stat(tmp_path / "cut" / "audio" / "train-000000.flac").st_mtime_ns
    make(tmp_path / "cut", workers=2)
    assert bytes_of(tmp_path / "whole") == bytes_of(tmp_path / "cut")
    assert os.stat(tmp_path / "cut" / "audio" / "train-000000.flac").st_mtime_ns == kept


def test_another_config_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(UserError, match="seed=1"):
        make(tmp_path, seed=2)
