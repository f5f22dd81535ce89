"""Importers of corpora with translations and questions, on trees in their official layouts."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sm_train.errors import UserError
from tests import corpora
from tests.unit.test_corpora import imported

TONE_S = corpora.tiny(1)[0].samples_S
SECONDS = len(TONE_S) / corpora.RATE_HZ


def kinds(tasks: list) -> list[tuple[str, str, str, str]]:
    said = [(t.utterance_id, f"st-{t.target_lang}" if t.task == "st" else t.task, t) for t in tasks]
    return [(identity, kind, t.variables.get("question", ""), t.answer) for identity, kind, t in said]


def common_voice(folder: Path) -> Path:
    for i in range(4):
        corpora.write_audio(folder / f"clips/common_voice_en_{i}.mp3", TONE_S)
    header = "client_id\tpath\tsentence\tup_votes"
    rows = [f'c{i % 2}\tcommon_voice_en_{i}.mp3\tSentence \\"{i}\\".\t2' for i in range(4)]
    corpora.write_lines(folder / "validated.tsv", [header, *rows])
    corpora.write_lines(folder / "train.tsv", [header, *rows[:2]])
    corpora.write_lines(folder / "dev.tsv", [header, rows[2]])
    return folder


def test_common_voice_alone_has_its_own_splits(tmp_path: Path) -> None:
    utterances, tasks = imported("covost", common_voice(tmp_path / "en"), tmp_path / "out")
    assert [(u.id, u.split, u.speaker, u.lang) for u in utterances] == [
        ("common_voice_en_0", "train", "c0", "en"),
        ("common_voice_en_1", "train", "c1", "en"),
        ("common_voice_en_2", "dev", "c0", "en"),
    ]
    assert utterances[0].text == 'Sentence "0".'
    assert utterances[0].audio == "../en/clips/common_voice_en_0.mp3"
    assert utterances[0].duration_s == pytest.approx(SECONDS, abs=0.15)  # mp3 pads
    assert {task.task for task in tasks} == {"asr"}


def test_covost_gives_each_clip_its_translations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = common_voice(tmp_path / "en")
    header = "path\tsentence\ttranslation\tclient_id"
    names = [f"common_voice_en_{i}.mp3" for i in range(4)]
    corpora.write_lines(
        source / "covost_v2.en_fr.train.tsv",
        [header, f"{names[0]}\tA.\tUn.\tc0", f"{names[1]}\tB.\tDeux.\tc1", f"{names[2]}\ttoo short"],
    )
    corpora.write_lines(source / "covost_v2.en_fr.test.tsv", [header, f"{names[3]}\tD.\tQuatre.\tc1"])
    corpora.write_lines(  # as downloaded: no sentences, a split that Common Voice did not have
        source / "covost_v2.en_zh-CN.tsv",
        [
            "path\ttranslation\tsplit",
            f"{names[0]}\t一。\ttrain",
            f"{names[3]}\t四\ttest_covost",
            f"{names[1]}\t二\ttest",
        ],
    )
    corpora.write_lines(source / "covost_v2.en_fr.tsv", ["path\ttranslation\tsplit", f"{names[2]}\tX\ttrain"])
    corpora.write_lines(source / "covost_v2.de_en.dev.tsv", [header, "../../x.mp3\tA\tB\tc", "/etc/passwd\tA\tB\tc"])
    utterances, tasks = imported("covost", source, tmp_path / "out")
    assert [(u.id[-1], u.split, u.text) for u in utterances] == [
        ("0", "train", "A."),
        ("1", "train", "B."),
        ("3", "test", "D."),
    ]
    assert [(identity[-1], kind, answer) for identity, kind, _, answer in kinds(tasks)] == [
        ("0", "asr", "A."), ("0", "st-fr", "Un."), ("0", "st-zh", "一。"), ("1", "asr", "B."), ("1", "st-fr", "Deux."),
        ("3", "asr", "D."), ("3", "st-fr", "Quatre."), ("3", "st-zh", "四"),
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert "1 two_splits: covost_v2.en_zh-CN.tsv:4" in said
    assert "2 outside: covost_v2.de_en.dev.tsv:2, covost_v2.de_en.dev.tsv:3" in said
    assert "1 bad_row: covost_v2.en_fr.train.tsv:4 (2 columns where the header has 4)" in said


def europarl(folder: Path) -> Path:
    audios = folder / "en/audios"
    for speech in ("en.2008.1", "en.2008.2"):
        corpora.write_audio(audios / f"{speech}.wav", np.tile(TONE_S, 4))
    for target, second in (("fr", "0.50 1.20"), ("de", "0.50 1.20")):
        data = folder / "en" / target / "train"
        corpora.write_lines(data / "segments.lst", ["en.2008.1 0.00 0.50", f"en.2008.1 {second}", "en.2008.2 1.0 99.0"])
        corpora.write_lines(data / "segments.en", ["One.", "Two.", "Three."])
        corpora.write_lines(data / f"segments.{target}", [f"{target} one", f"{target} two", f"{target} three"])
        corpora.write_lines(data / "speeches.lst", ["en.2008.1", "en.2008.2"])
        corpora.write_lines(data / "speakers.lst", ["MEP_1", "MEP_2"])
    test = folder / "en/fr/test"
    corpora.write_lines(test / "segments.lst", ["en.2008.1 0.50 1.20", "en.2008.2 0.25 0.75", "broken", "../x 0 1"])
    corpora.write_lines(test / "segments.en", ["Two.", "Four.", "x", "x"])
    corpora.write_lines(test / "segments.fr", ["fr two", "fr four", "x", "x"])
    return folder


def test_europarl_st_joins_pairs_and_keeps_test_segments_out_of_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = europarl(tmp_path / "v1.1")
    utterances, tasks = imported("europarl_st", source, tmp_path / "out")
    assert [(u.id, u.start_s, round(u.duration_s, 6), u.split, u.speaker) for u in utterances] == [
        ("en.2008.1_0000000_0000500", 0.0, 0.5, "train", "MEP_1"),
        ("en.2008.1_0000500_0001200", 0.5, 0.7, "test", ""),
        ("en.2008.2_0000250_0000750", 0.25, 0.5, "test", ""),
    ]
    assert [(kind, answer) for _, kind, _, answer in kinds(tasks)] == [
        ("asr", "One."), ("st-de", "de one"), ("st-fr", "fr one"), ("asr", "Two."), ("st-fr", "fr two"),
        ("asr", "Four."), ("st-fr", "fr four"),
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert "1 truncated: en/de/train/segments.lst:3" in said
    assert "2 two_splits" in said
    assert "1 bad_row: en/fr/test/segments.lst:3" in said
    assert "1 outside: en/fr/test/segments.lst:4" in said
    utterances, _ = imported("europarl_st", source, tmp_path / "de", "--pairs", "en-de")
    assert [u.split for u in utterances] == ["train", "train"]
    with pytest.raises(UserError, match="it has en-de, en-fr, not en-it"):
        imported("europarl_st", source, tmp_path / "it", "--pairs", "en-it")


def test_europarl_st_as_it_comes_says_how_to_convert_it(tmp_path: Path) -> None:
    source = europarl(tmp_path / "v1.1")
    for path in (source / "en/audios").iterdir():
        path.rename(path.with_suffix(".m4a"))
    with pytest.raises(UserError, match=r"\.m4a files, .* for f in .*en/audios/\*\.m4a; do ffmpeg -i") as error:
        imported("europarl_st", source, tmp_path / "out")
    assert "\n" not in str(error.value)


def spoken_squad(folder: Path) -> Path:
    for number in ("0_0_0", "0_0_1", "0_1_0", "1_0_0"):
        corpora.write_audio(folder / f"Spoken-SQuAD_audio/train_wav/{number}.wav", TONE_S, 24_000)

    def asked(question: str, text: str, start: int) -> dict[str, object]:
        return {"question": question, "id": "5", "answers": [{"text": text, "answer_start": start}]}

    first = {"context": "the boat is red. the bird sees two stones.", "qas": []}
    first["qas"] = [asked("What is red?", "the boat", 0), asked("How many stones?", "two", 31)]
    first["qas"] += [asked("What is red?", "the boat", 0)]  # the corpus has questions twice
    torn = {"context": "one. two. three.", "qas": [asked("Which?", "two", 5)]}
    topics = [{"title": "a", "paragraphs": [first, torn]}, {"title": "b", "paragraphs": [{"qas": 3}, first]}]
    (folder / "spoken_train-v1.1.json").write_text(json.dumps({"data": topics}))
    return folder


def test_spoken_squad_asks_the_sentence_that_holds_the_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    utterances, tasks = imported("spoken_squad", spoken_squad(tmp_path / "squad"), tmp_path / "out")
    ids = ["spoken-squad-train-0_0_0", "spoken-squad-train-0_0_1"]
    assert [(u.id, u.text, u.split) for u in utterances] == [
        (ids[0], "the boat is red", "train"), (ids[1], "the bird sees two stones", "train")
    ]  # fmt: skip
    assert utterances[0].duration_s == pytest.approx(len(TONE_S) / 24_000)
    assert kinds(tasks) == [
        (ids[0], "asr", "", "the boat is red"), (ids[0], "sqa", "What is red?", "the boat"),
        (ids[1], "asr", "", "the bird sees two stones"), (ids[1], "sqa", "How many stones?", "two"),
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert "1 sentences: spoken_train-v1.1.json:0_1 (3 sentences in the text, 1 files" in said
    assert "1 bad_row: spoken_train-v1.1.json:1_0" in said
    assert "1 missing_audio: spoken_train-v1.1.json:1_1" in said


def test_spoken_squad_by_paragraph_joins_the_sentences(tmp_path: Path) -> None:
    source = spoken_squad(tmp_path / "squad")
    utterances, tasks = imported("spoken_squad", source, tmp_path / "out", "--unit", "paragraph")
    assert [u.id for u in utterances] == ["spoken-squad-train-0_0", "spoken-squad-train-0_1"]
    assert utterances[0].audio == "audio/spoken-squad-train-0_0.wav"
    assert utterances[0].duration_s == pytest.approx(2 * len(TONE_S) / 24_000)
    with wave.open(str(source / "Spoken-SQuAD_audio/train_wav/0_0_0.wav")) as one:
        sentence = one.readframes(one.getnframes())
    with wave.open(str(tmp_path / "out" / utterances[0].audio)) as joined:
        assert joined.readframes(joined.getnframes()) == sentence * 2
    assert [task.answer for task in tasks if task.task == "sqa"] == ["the boat", "two", "two"]


def test_librisqa_joins_the_questions_of_both_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, identity in (("train-clean-360", "14-208-0000"), ("test-clean", "61-70968-0000")):
        speaker, chapter, _ = identity.split("-")
        corpora.write_audio(tmp_path / f"LibriSpeech/{split}/{speaker}/{chapter}/{identity}.flac", TONE_S)
    one = {"speech_path": "LibriSpeech/train-clean-360/14/208/14-208-0000.wav", "text": "THE BOAT", "duration": 1}
    two = {"speech_path": "test-clean/61/70968/61-70968-0000.flac", "text": "A BIRD"}
    rows = [{**one, "question": "What?", "answer": "A boat."}, {**two, "question": "Who?", "answer": "A bird."}]
    rows += [{"speech_path": "test-clean/../../etc/passwd", "question": "x", "answer": "x"}, 7]
    first, second = tmp_path / "LibriSQA-PartI/LibriSQA-PartI-train.json", tmp_path / "LibriSQA-PartII/x.json"
    for path in (first, second):
        path.parent.mkdir()
    first.write_text(json.dumps(rows))
    second.write_text(json.dumps([{**one, "question_and_option": "What? A. boat B. car", "answer": "A"}]))
    utterances, tasks = imported("librisqa", tmp_path, tmp_path / "out")
    assert [(u.id, u.split, u.speaker, u.text) for u in utterances] == [
        ("14-208-0000", "train", "14", "THE BOAT"), ("61-70968-0000", "test-clean", "61", "A BIRD"),
    ]  # fmt: skip
    assert [(q, a) for _, kind, q, a in kinds(tasks) if kind == "sqa"] == [
        ("What?", "A boat."), ("What? A. boat B. car", "A"), ("Who?", "A bird."),
    ]  # fmt: skip
    assert "2 bad_row: LibriSQA-PartI-train.json:3, LibriSQA-PartI-train.json:4" in capsys.readouterr().out


def test_a_canary_manifest_joins_translations_with_their_transcripts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpora.write_audio(tmp_path / "a/x.wav", np.tile(TONE_S, 2))
    corpora.write_audio(tmp_path / "b/x.wav", TONE_S)
    common = {"audio_filepath": "a/x.wav", "offset": 0.5, "duration": 0.5, "source_lang": "en"}
    rows = [
        {**common, "target_lang": "fr", "answer": "le bateau"},
        {**common, "target_lang": "en", "answer": "the boat", "pnc": "no"},
        {**common, "target_lang": "de", "text": "das Boot"},
        {"audio_filepath": "b/x.wav", "text": "a bird", "lang": "en", "question": "what", "answer": "a bird"},
        {"audio_filepath": "b/x.wav", "text": "a bird", "lang": "en", "question": "who", "answer": "it"},
        {**common, "offset": 0.75, "target_lang": "fr", "text": "seul"},
        {"audio_filepath": "a/x.wav", "duration": float("nan"), "text": "x"},
        {"duration": 1.0, "text": "x"},
    ]
    path = corpora.write_lines(tmp_path / "canary.jsonl", [*map(json.dumps, rows), "{broken", "[" * 100_000])
    utterances, tasks = imported("nemo", path, tmp_path / "out")
    assert [(u.id, u.start_s, u.text, u.split) for u in utterances] == [
        ("a-x_0000500_0001000", 0.5, "the boat", "train"), ("b-x", 0.0, "a bird", "train"),
    ]  # fmt: skip
    assert [(kind, question, answer) for _, kind, question, answer in kinds(tasks)] == [
        ("asr", "", "the boat"), ("st-fr", "", "le bateau"), ("st-de", "", "das Boot"),
        ("asr", "", "a bird"), ("sqa", "what", "a bird"), ("sqa", "who", "it"),
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert "1 no_transcript: canary.jsonl:6" in said
    assert "2 bad_row: canary.jsonl:7, canary.jsonl:8" in said
    assert "2 not_json: canary.jsonl:9, canary.jsonl:10" in said


def test_a_hugging_face_set_has_translations_and_questions_by_column(tmp_path: Path) -> None:
    audio = [{"bytes": None, "path": str(corpora.write_audio(tmp_path / f"{i}.wav", TONE_S))} for i in range(2)]
    table = pa.table(
        {
            "file": pa.array(["0.wav", "1.wav"]), "audio": audio, "sentence": ["a boat", "a bird"],
            "translation": ["un bateau", None], "texts": [{"de": "ein Boot", "en": "a boat"}, {"de": "", "en": ""}],
            "question": ["what?", ""], "answer": ["a boat", "nobody asked"], "language": ["English", "en_US"],
        }
    )  # fmt: skip
    (tmp_path / "set").mkdir()
    pq.write_table(table, tmp_path / "set/all.parquet")
    options = ["--translation", "translation=fr", "texts=de"]
    utterances, tasks = imported("hf", tmp_path / "set", tmp_path / "out", *options)
    assert [(u.id, u.audio, u.lang, u.split) for u in utterances] == [
        ("0", "../0.wav", "en", "train"), ("1", "../1.wav", "en", "train"),
    ]  # fmt: skip
    assert not (tmp_path / "out/audio").exists()
    assert [(identity, kind, answer) for identity, kind, _, answer in kinds(tasks)] == [
        ("0", "asr", "a boat"), ("0", "sqa", "a boat"), ("0", "st-fr", "un bateau"), ("0", "st-de", "ein Boot"),
        ("1", "asr", "a bird"),
    ]  # fmt: skip
    for options, says in (
        (["--translation", "gone=fr"], "has no column gone"),
        (["--translation", "fr"], "not of the form COLUMN=LANG"),
        (["--text-column", "words"], "has no column words; --text-column is one of file, audio"),
    ):
        with pytest.raises(UserError, match=says):
            imported("hf", tmp_path / "set", tmp_path / "out", *options)


def test_a_list_with_a_header_has_segments_translations_and_questions(tmp_path: Path) -> None:
    corpora.write_audio(tmp_path / "a.wav", np.tile(TONE_S, 2))
    header = "id\taudio\tsrc_text\ttgt_text\tsrc_lang\ttgt_lang\tstart_s\tduration_s\ttext.de\tquestion\tanswer"
    rows = ["x\ta.wav\tone\tun\ten\tfr\t0.25\t0.5\teins\twhich?\tone", "y\ta.wav\ttwo\t\ten\t\t1\tlong\t\t\t"]
    path = corpora.write_lines(tmp_path / "all.tsv", [header, *rows])
    utterances, tasks = imported("tsv", path, tmp_path / "out", "--split", "dev")
    assert [(u.id, u.start_s, u.duration_s, u.text, u.split) for u in utterances] == [("x", 0.25, 0.5, "one", "dev")]
    assert [(kind, answer) for _, kind, _, answer in kinds(tasks)] == [
        ("asr", "one"), ("st-de", "eins"), ("st-fr", "un"), ("sqa", "one"),
    ]  # fmt: skip
