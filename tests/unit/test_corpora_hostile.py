"""Importers on what others may have written: names that leave their folder, links, archives, commands, odd bytes."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sm_train.data.manifest import read_instructions, read_manifest
from sm_train.errors import UserError
from tests import corpora
from tests.unit.test_corpora import SAID, expected, imported, seen
from tools.corpora import reading
from tools.corpora.__main__ import main

ONE = SAID[0]


def inside(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_embedded_audio_never_leaves_its_folder_whatever_its_ids_are(tmp_path: Path) -> None:
    content = corpora.encoded(ONE, tmp_path / "aside")
    ids = ["../../up", "/etc/passwd", "a/b", "a_b", ".hidden", "x" * 300, "é", "a\0b", "..", "A"]
    audio = [{"bytes": content, "path": "../../../up.sh"} for _ in ids]
    table = pa.table({"id": ids, "audio": audio, "text": ["said"] * len(ids)})
    folder = tmp_path / "deep/corpus"
    folder.mkdir(parents=True)
    pq.write_table(table, folder / "train-00000-of-00001.parquet")
    before = inside(tmp_path)
    utterances, _ = imported("hf", folder, tmp_path / "deep/out")
    ids.remove("a\0b")  # its audio is there, its row is not: no manifest may have it
    assert [u.id for u in utterances] == sorted(ids)
    new = inside(tmp_path) - before
    assert {Path(name).parts[:2] for name in new} == {("deep", "out")}
    assert len([name for name in new if name.startswith("deep/out/audio/")]) == len(ids) + 1
    assert all(u.audio.startswith("audio/") and u.audio.endswith(".flac") for u in utterances)
    assert len({u.audio.lower() for u in utterances}) == len(ids)


def test_a_saved_dataset_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    corpora.save_to_disk(tmp_path / "set", corpora.hf_table(SAID[:2], tmp_path / "aside"), "train")
    for name in ("../secret.arrow", "/etc/passwd", "", "..", 5):
        (tmp_path / "set/state.json").write_text(json.dumps({"_data_files": [{"filename": name}], "_split": "train"}))
        with pytest.raises(UserError, match="not a name in that folder"):
            imported("hf", tmp_path / "set", tmp_path / "out")
    (tmp_path / "set/state.json").write_text(json.dumps({"_data_files": 5}))
    with pytest.raises(UserError, match=r"state\.json"):
        imported("hf", tmp_path / "set", tmp_path / "out")


def test_a_shard_that_ends_early_costs_only_its_own_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpora.save_to_disk(tmp_path / "set", corpora.hf_table(SAID, tmp_path / "aside"), "dev", shards=3)
    shard = tmp_path / "set/data-00001-of-00003.arrow"
    shard.write_bytes(shard.read_bytes()[:-5000])
    utterances, _ = imported("hf", tmp_path / "set", tmp_path / "out", "--lang", "en")
    assert seen(utterances) == expected([*SAID[:2], *SAID[4:]], "dev")
    assert "1 bad_file: data-00001-of-00003.arrow" in capsys.readouterr().out


def test_importing_into_the_source_is_the_same_twice(tmp_path: Path) -> None:
    corpora.hf_parquet(tmp_path, SAID)
    first, _ = imported("hf", tmp_path, tmp_path)
    again, _ = imported("hf", tmp_path, tmp_path)
    assert first == again


def test_no_command_archive_address_or_changed_recording_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = corpora.write_audio(tmp_path / "a.wav", ONE.samples_S)
    spoken = corpora.supervision(ONE)

    def cut(**changes: object) -> dict[str, object]:
        recording = {**corpora.recording(ONE, path), **changes}
        return {
            "id": "c",
            "type": "MonoCut",
            "start": 0,
            "duration": 1,
            "supervisions": [spoken],
            "recording": recording,
        }

    touched = tmp_path / "touched"
    source = {"channels": [0], "source": f"touch {touched}"}
    rows = [
        cut(sources=[{**source, "type": "command"}]),
        cut(sources=[{**source, "type": "url"}]),
        cut(sources=[{"channels": [0], "source": str(path), "type": "file"}] * 2),
        cut(transforms=[{"name": "Speed"}]),
        {**cut(), "type": "MixedCut"},
        {**cut(), "supervisions": []},
        {**cut(), "start": "now"},
        {"type": "MonoCut"},
        cut(),
    ]
    corpora.write_lines(tmp_path / "cuts.jsonl", map(json.dumps, rows))
    utterances, _ = imported("lhotse", tmp_path / "cuts.jsonl", tmp_path / "out", "--split", "x")
    assert seen(utterances) == expected([ONE], "x")
    said = capsys.readouterr().out
    assert not touched.exists()
    for count, reason in ((3, "source_type"), (1, "transforms"), (1, "cut_type"), (1, "empty_text"), (2, "bad_row")):
        assert f"{count} {reason}: cuts.jsonl:" in said


def test_one_channel_of_several_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    corpora.write_audio(tmp_path / "two.wav", np.stack([ONE.samples_S] * 2, axis=1))
    corpora.write_audio(tmp_path / "one.wav", ONE.samples_S)
    corpora.write_lines(tmp_path / "wav.scp", ["two two.wav", "one one.wav"])
    corpora.write_lines(tmp_path / "segments", ["a two 0 0.5 1", "b one 0 0.5 1", "c two 0 -1", "d two 0.5 x"])
    corpora.write_lines(tmp_path / "text", ["a x", "b x", "c x", "d x", "e x"])
    utterances, _ = imported("kaldi", tmp_path, tmp_path / "out")
    assert [(u.id, u.duration_s) for u in utterances] == [("b", 0.5), ("c", ONE.duration_s)]
    said = capsys.readouterr().out
    assert "1 channels: text:1" in said
    assert "1 bad_row: segments:4" in said
    assert "1 no_segment: text:5" in said


def test_links_that_go_round_and_names_that_no_file_can_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "corpus"
    corpora.beside(folder, SAID)
    (folder / "train/round").symlink_to(folder)
    (folder / "nowhere.wav").symlink_to(folder / "absent.wav")
    (folder / "nowhere.txt").write_text("said")
    os.mkfifo(folder / "pipe.wav")
    (folder / "pipe.txt").write_text("said")
    corpora.write_audio(folder / "linked/target.wav", ONE.samples_S)
    utterances, _ = imported("folder", folder, tmp_path / "out", "--split", "x")
    assert [u.id for u in utterances] == [one.id for one in SAID]
    said = capsys.readouterr().out
    assert "2 missing_audio: nowhere.wav, pipe.wav" in said
    assert "1 no_text: linked/target.wav" in said
    rows = [{"audio_filepath": name, "text": "x"} for name in ("a\0b.wav", "x" * 5000, ".", "a.raw", "\ud800.wav")]
    rows.append({"audio_filepath": str(folder / "train" / f"{SAID[-1].id}.wav"), "text": "fine", "id": "ok"})
    (tmp_path / "a.raw").write_bytes(b"raw")
    path = corpora.write_lines(tmp_path / "m.json", map(json.dumps, rows))
    utterances, _ = imported("nemo", path, tmp_path / "out2")
    assert [u.id for u in utterances] == ["ok"]
    said = capsys.readouterr().out
    assert "3 bad_id" in said  # which are made of the names
    assert "1 missing_audio" in said
    assert "1 undecodable" in said


def test_a_name_in_a_list_does_not_leave_its_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpora.write_audio(tmp_path / "secret.wav", ONE.samples_S)
    root = tmp_path / "root"
    corpora.write_audio(root / "a.wav", ONE.samples_S)
    listed = [str(root), "../secret.wav\t1", f"{tmp_path}/secret.wav\t1", "a.wav\t1"]
    corpora.write_lines(tmp_path / "lists/train.tsv", listed)
    corpora.write_lines(tmp_path / "lists/train.wrd", ["x", "y", "z"])
    utterances, _ = imported("tsv", tmp_path / "lists", tmp_path / "out")
    assert [(u.id, u.text) for u in utterances] == [("a", "z")]
    assert "2 outside: train.tsv:2, train.tsv:3" in capsys.readouterr().out
    corpora.librispeech(tmp_path, SAID)
    chapter = tmp_path / "LibriSpeech/train-clean-100/84/1000"
    with (chapter / "84-1000.trans.txt").open("a") as file:
        file.write("../../../../../secret X\n")
    corpora.write_audio(chapter / "84-1000-9999.flac", ONE.samples_S)
    utterances, _ = imported("librispeech", tmp_path, tmp_path / "out3")
    assert seen(utterances) == expected(SAID)
    said = capsys.readouterr().out
    assert "1 outside: 84-1000.trans.txt:4" in said
    assert "1 no_text: train-clean-100/84-1000-9999.flac" in said


def test_a_compressed_line_without_end_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with gzip.open(tmp_path / "cuts.jsonl.gz", "wb") as file:
        for _ in range(64):
            file.write(b"[" * (1 << 20))
    with pytest.raises(UserError, match="line 1 is longer than 16 MiB"):
        imported("lhotse", tmp_path / "cuts.jsonl.gz", tmp_path / "out")
    (tmp_path / "cuts.jsonl.gz").write_bytes((tmp_path / "cuts.jsonl.gz").read_bytes()[:50])
    monkeypatch.setattr(reading, "LONGEST_LINE", 10)
    with pytest.raises(UserError, match=r"cannot be read to its end|longer than"):
        imported("lhotse", tmp_path / "cuts.jsonl.gz", tmp_path / "out")


def test_a_good_entry_is_taken_where_an_earlier_one_of_its_id_is_bad(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = corpora.write_audio(tmp_path / "a.wav", ONE.samples_S)
    rows = [{"id": "u", "audio_filepath": name, "text": text} for name, text in
            (("absent.wav", "a"), (path.name, "b"), ("./a.wav", "c"))]  # fmt: skip
    rows.append({"id": "v", "audio_filepath": "a.wav", "offset": 0.25, "duration": 30, "text": "d"})
    rows.append({"id": "w", "audio_filepath": "a.wav", "offset": -1, "text": "d"})
    utterances, _ = imported("nemo", corpora.write_lines(tmp_path / "m.json", map(json.dumps, rows)), tmp_path / "out")
    assert [(u.id, u.text) for u in utterances] == [("u", "b")]
    said = capsys.readouterr().out
    for reason in ("missing_audio: m.json:1", "truncated: m.json:4", "bad_time: m.json:5"):
        assert f"1 {reason}" in said


def test_nothing_is_written_where_nothing_is_good_and_a_former_import_stays(tmp_path: Path) -> None:
    corpora.beside(tmp_path / "corpus", SAID)
    first, _ = imported("folder", tmp_path / "corpus", tmp_path / "out")
    for path in (tmp_path / "corpus").rglob("*.wav"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"no utterance could be imported: 6 undecodable: .*\.wav"):
        imported("folder", tmp_path / "corpus", tmp_path / "out")
    assert read_manifest(tmp_path / "out/manifest.parquet") == first


def test_a_killed_import_never_leaves_a_manifest_beside_instructions_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpora.beside(tmp_path / "old", SAID[:3])
    corpora.beside(tmp_path / "new", SAID[3:])
    out, replace, seen_states = tmp_path / "out", os.replace, set()
    for killed_at in range(1, 4):
        main(["folder", str(tmp_path / "old"), str(out)])
        calls = 0

        def replace_or_die(one: object, other: object, killed_at: int = killed_at) -> None:
            nonlocal calls
            calls += 1
            if calls == killed_at:
                raise KeyboardInterrupt
            replace(one, other)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace_or_die)
            with contextlib.suppress(KeyboardInterrupt):
                main(["folder", str(tmp_path / "new"), str(out)])
        if (out / "manifest.parquet").exists():
            ids = {u.id for u in read_manifest(out / "manifest.parquet")}
            assert ids == {task.utterance_id for task in read_instructions(out / "instructions.parquet")}
            seen_states.add(len(ids))
        else:
            seen_states.add(0)
    assert calls == 2
    assert seen_states == {0, 3}


def test_paths_are_relative_where_corpus_and_manifest_can_move_together(tmp_path: Path) -> None:
    corpora.beside(tmp_path / "data/corpus", [ONE])
    corpora.beside(tmp_path / "elsewhere", [ONE])
    real = os.path.realpath(tmp_path)
    name = f"{ONE.split}/{ONE.id}.wav"

    def audio(source: str, out: str, *options: str) -> str:
        return imported("folder", tmp_path / source, tmp_path / out, *options)[0][0].audio

    assert audio("data/corpus", "data/corpus") == name
    assert audio("data/corpus", "data/out") == f"../corpus/{name}"
    assert audio("data/corpus", "data/out", "--absolute") == f"{real}/data/corpus/{name}"
    assert audio("elsewhere", "data/out") == f"{real}/elsewhere/{name}"
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    assert audio("data/linked", "data/out") == f"{real}/elsewhere/{name}"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--speaker-from", "("], "no regular expression"),
        (["--speaker-from", "a"], "has 0 groups"),
    ],
)
def test_a_wrong_option_is_one_line(tmp_path: Path, options: list[str], says: str) -> None:
    corpora.beside(tmp_path / "corpus", [ONE])
    with pytest.raises(UserError, match=says):
        main(["folder", str(tmp_path / "corpus"), str(tmp_path / "out"), *options])
