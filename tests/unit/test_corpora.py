from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from sm_train import config
from sm_train.data.manifest import read_instructions, read_manifest
from sm_train.errors import UserError
from sm_train.models.speech import EncoderConfig
from sm_train.precompute import PrecomputeConfig, in_this_process, run
from sm_train.records import Task, Utterance
from tests import corpora
from tests.builders import ROOT, run_module
from tests.corpora import Said
from tools.corpora import librispeech
from tools.corpora.__main__ import main

SAID = corpora.tiny()


def imported(*argv: object) -> tuple[list[Utterance], list[Task]]:
    main([str(word) for word in argv])
    out = Path(str(argv[2]))
    return read_manifest(out / "manifest.parquet"), read_instructions(out / "instructions.parquet")


def expected(said: Sequence[Said], split: str | None = None) -> list[tuple[object, ...]]:
    return [(one.id, one.duration_s, one.text, "en", one.speaker, split or one.split) for one in said]


def seen(utterances: Sequence[Utterance]) -> list[tuple[object, ...]]:
    return [(u.id, u.duration_s, u.text, u.lang, u.speaker, u.split) for u in utterances]


def shard_hashes(manifest: Path, encoder: Path, out: Path) -> dict[str, str]:
    config = EncoderConfig(path=str(encoder), layer=2, device="cpu")
    run(PrecomputeConfig(str(manifest), str(out), config, [], unit_utterances=4, batch_s=5.0), in_this_process)
    found = sorted(out.glob("part-*/shard.*.mds"))
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, encoder_folder: Path) -> dict[str, str]:
    """The shards of the tiny corpus as LibriSpeech has it."""
    folder = tmp_path_factory.mktemp("reference")
    corpora.librispeech(folder, SAID)
    main(["librispeech", str(folder), str(folder / "out")])
    hashes = shard_hashes(folder / "out/manifest.parquet", encoder_folder, folder / "shards")
    assert len(hashes) == 2
    return hashes


@pytest.mark.parametrize("layout", corpora.LAYOUTS)
def test_the_same_corpus_in_every_layout_is_the_same_utterances_and_the_same_shards(
    layout: str, tmp_path: Path, encoder_folder: Path, reference: dict[str, str]
) -> None:
    name, build, says_split = corpora.LAYOUTS[layout]
    options = build(tmp_path / "corpus", SAID)
    options += [] if says_split else ["--split", "all"]
    utterances, tasks = imported(name, tmp_path / "corpus", tmp_path / "out", *options)
    assert seen(utterances) == expected(SAID, None if says_split else "all")
    assert tasks == [Task(one.id, "asr", {}, "en", one.text) for one in SAID]
    assert shard_hashes(tmp_path / "out/manifest.parquet", encoder_folder, tmp_path / "shards") == reference


@pytest.mark.parametrize("layout", corpora.LAYOUTS)
def test_a_second_import_gives_the_same_bytes(layout: str, tmp_path: Path) -> None:
    name, build, _ = corpora.LAYOUTS[layout]
    options = build(tmp_path / "corpus", SAID)
    contents = []
    for _ in range(2):
        main([name, str(tmp_path / "corpus"), str(tmp_path / "out"), *options])
        files = sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())
        contents.append({path.name: path.read_bytes() for path in files})
    assert contents[0] == contents[1]
    assert {"manifest.parquet", "instructions.parquet"} <= set(contents[0])


@pytest.mark.parametrize("name", sorted({name for name, *_ in corpora.LAYOUTS.values()}))
def test_a_source_of_another_layout_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    with pytest.raises(UserError) as error:
        main([name, str(tmp_path / "corpus"), str(tmp_path / "out")])
    assert str(tmp_path / "corpus") in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="does not exist"):
        main([name, str(tmp_path / "nowhere"), str(tmp_path / "out")])


def test_librispeech_s_splits_are_those_of_the_shipped_configs() -> None:
    asked = set()
    for path in (ROOT / "configs").glob("*/*-[89]b.yaml"):
        mapping = config.read_yaml(path)
        asked |= {*mapping.get("splits", []), *mapping.get("valid_splits", [])}
    assert asked == set(librispeech.SPLITS.values())


def test_the_command_says_what_it_wrote_and_a_mistake_in_one_line(tmp_path: Path) -> None:
    corpora.beside(tmp_path / "corpus", SAID)
    (tmp_path / "corpus/train" / f"{SAID[-1].id}.txt").unlink()
    done = run_module("tools.corpora", "folder", tmp_path / "corpus", tmp_path / "out", "--split", "test")
    assert (done.returncode, done.stderr) == (0, "")
    assert "manifest.parquet: 5 utterances, 0.00 h (test 0.00 h)" in done.stdout
    assert f"left out: 1 no_text: train/{SAID[-1].id}.wav" in done.stdout
    done = run_module("tools.corpora", "kaldi", tmp_path / "corpus", tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"error: {tmp_path}/corpus is no Kaldi data folder")


def test_bad_rows_are_counted_and_good_rows_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpora.kaldi(tmp_path, SAID)
    data = tmp_path / "train"
    with (data / "wav.scp").open("ab") as file:
        file.write(b"u1 sph2pipe -f wav /x.sph |\nu2 raw.ark:17\nu3 /nowhere/u3.wav\nu4 \xff.wav\nu5 ../wavs/bad.wav\n")
        file.write(f"u6 {tmp_path}/wavs/{SAID[0].id}.wav\n".encode())
    (tmp_path / "wavs/bad.wav").write_bytes(b"no audio")
    with (data / "text").open("a") as file:
        file.write("u1 hello\nu2 hello\nu3 hello\nu4 hello\nu5 hello\nu6\nu7 hello\n" + f"{SAID[-1].id} again\n")
    utterances, _ = imported("kaldi", tmp_path, tmp_path / "out")
    assert seen(utterances) == expected(SAID)
    said = capsys.readouterr().out
    assert "1 command: wav.scp:4 (a command, which is never run" in said
    assert "1 archive: wav.scp:5" in said
    assert "1 undecodable: text:8" in said
    assert "1 not_utf8: wav.scp:7" in said
    assert "1 empty_text: text:9" in said
    assert "1 duplicate_line: text:11" in said
    assert "missing_audio" in said
