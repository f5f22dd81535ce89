"""Tasks of a target set."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sm_train.chat import Chat
from sm_train.data import shards
from sm_train.data.instructions import tasks_facts
from sm_train.errors import UserError
from sm_train.models import targets, tasks
from sm_train.models.tokenizer import Tokenizer
from tests import builders, tuning
from tests.growing import grow
from tests.tuning import asr, table_path, write


@pytest.fixture
def root(shard_set: Path, tmp_path: Path) -> Path:
    """A shard set of one's own, without tasks."""
    return Path(shutil.copytree(shard_set, tmp_path / "set"))


def build(root: Path, *paths: Path) -> str:
    return tasks.build(root, tuning.TARGET, paths)


def state(path: Path) -> tuple[int, int, bytes]:
    return path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes()


def test_the_table_has_each_task_with_its_answer_s_ids(root: Path, llm_folder: Path, tmp_path: Path) -> None:
    path = tuning.instructions(tmp_path / "tasks.jsonl", root)
    asked = [json.loads(line) for line in path.read_text().splitlines()]
    said = build(root, path)
    rows = pq.read_table(table_path(root)).to_pylist()
    assert list(rows[0]) == [
        "utterance", "id", "task", "variables", "target_lang", "answer", "answer_ids", "num_answer_tokens",
    ]  # fmt: skip
    ids = shards.read_table(root, "utterances.parquet").column("id").to_pylist()
    chat = Chat(Tokenizer(llm_folder, None).inner)
    for row, task in zip(rows, asked, strict=True):
        assert ids[row["utterance"]] == row["id"] == task["utterance_id"]
        assert {name: row[name] for name in ("task", "target_lang", "answer")} == {
            name: task[name] for name in ("task", "target_lang", "answer")
        }
        assert json.loads(row["variables"]) == task["variables"]
        assert row["answer_ids"] == [*chat.transcript_ids(task["answer"]), chat.end_id]
        assert row["num_answer_tokens"] == len(row["answer_ids"])
    most = max(row["num_answer_tokens"] for row in rows)
    sqa = sum(task["task"] == "sqa" for task in asked)
    assert sqa
    assert said == (f"{len(asked)} tasks (30 asr, 60 st, {sqa} sqa), answers of up to {most} tokens")


def test_the_metadata_says_what_the_tasks_came_from(root: Path, llm_folder: Path, tmp_path: Path) -> None:
    build(root, tuning.instructions(tmp_path / "tasks.jsonl", root))
    facts = tasks_facts(root / "targets/tiny")
    assert set(facts) == {"chat", "instructions"}
    assert facts["chat"] == Chat(Tokenizer(llm_folder, None).inner).fingerprint
    assert tasks_facts(root / "targets") == {}


def test_features_and_targets_are_left_as_they_are(root: Path, tmp_path: Path) -> None:
    before = {path: state(path) for path in root.rglob("*") if path.is_file()}
    build(root, tuning.instructions(tmp_path / "tasks.jsonl", root))
    after = {path: state(path) for path in root.rglob("*") if path.is_file()}
    assert set(after) - set(before) == {table_path(root)}
    assert {path: after[path] for path in before} == before


def test_the_same_instructions_again_are_left_alone(root: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "tasks.jsonl", asr("utt-000"), asr("utt-003"))
    build(root, path)
    before = state(table_path(root))
    copy = Path(shutil.copy(path, tmp_path / "copy.jsonl"))
    assert build(root, copy) == "tasks complete"
    assert state(table_path(root)) == before


def test_changed_instructions_are_written_anew(root: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "tasks.jsonl", asr("utt-000"))
    build(root, path)
    write(path, asr("utt-000", "the green boat"))
    assert "1 tasks" in build(root, path)
    assert pq.read_table(table_path(root)).column("answer").to_pylist() == ["the green boat"]


def test_another_template_writes_them_anew(
    root: Path, llm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "tasks.jsonl", asr("utt-000"))
    build(root, path)
    before = tasks_facts(root / "targets/tiny")
    other = Path(shutil.copytree(llm_folder, tmp_path / "llm"))
    (other / "chat_template.jinja").write_text("{% for m in messages %}<s>{{ m['content'] }}<spare>{% endfor %}")
    monkeypatch.setattr(tasks.checkpoints, "resolve", lambda *_: other)
    assert "1 tasks" in build(root, path)
    after = tasks_facts(root / "targets/tiny")
    assert after["chat"] != before["chat"]
    assert after["instructions"] == before["instructions"]
    assert pq.read_table(table_path(root)).column("answer_ids")[0].as_py()[-1] == 3  # <spare> ends a turn there


def test_several_files_are_one_list_in_their_order(root: Path, tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", asr("utt-004"), asr("utt-001"))
    two = tmp_path / "two.parquet"
    pq.write_table(pa.Table.from_pylist([{**asr("utt-002"), "variables": "{}"}]), two)
    build(root, one, two)
    assert pq.read_table(table_path(root)).column("id").to_pylist() == ["utt-004", "utt-001", "utt-002"]
    build(root, two, one)
    assert pq.read_table(table_path(root)).column("id").to_pylist() == ["utt-002", "utt-004", "utt-001"]


def test_a_stranger_is_refused_and_the_old_tasks_stay(root: Path, tmp_path: Path) -> None:
    build(root, write(tmp_path / "good.jsonl", asr("utt-000")))
    before = state(table_path(root))
    strangers = [asr(f"stranger-{i}") for i in (1, 1, 2, 3, 4)]
    bad = write(tmp_path / "bad.jsonl", asr("utt-001"), *strangers)
    with pytest.raises(UserError) as caught:
        build(root, bad)
    assert str(caught.value) == (
        f"5 of 6 instructions are about utterances that {root} does not have, such as 'stranger-1', 'stranger-2', "
        "'stranger-3'; mend the instructions, or name the shard set that they belong to"
    )
    assert state(table_path(root)) == before


@pytest.mark.parametrize("where", ["", "targets/tiny"])
def test_a_task_about_a_quarantined_utterance_is_left_out_and_counted(root: Path, tmp_path: Path, where: str) -> None:
    path = root / where / "quarantine.parquet"
    table = pq.read_table(path)
    bad = {"id": "lost", "reason": "silent", "detail": "no sound", "attempts": 1}
    pq.write_table(pa.concat_tables([table, pa.Table.from_pylist([bad], schema=table.schema)]), path)
    builders.recommit(path)
    said = build(root, write(tmp_path / "tasks.jsonl", asr("utt-000"), asr("lost")))
    assert "1 tasks (1 asr)" in said
    assert said.endswith("; 1 left out, their utterances are in quarantine")
    assert pq.read_table(table_path(root)).column("id").to_pylist() == ["utt-000"]


def test_an_utterance_whose_text_did_not_fit_is_quarantined_and_left_out(
    root: Path, llm_folder: Path, tmp_path: Path
) -> None:
    """The same by the real way: committed in the shard set, in quarantine in the target set."""
    rows = pq.read_table(root / "utterances.parquet").to_pylist()
    rows[3]["text"] = "zzz qqq " * 30
    builders.recommit(builders.write_manifest(root / "utterances.parquet", rows))
    targets.build(targets.TargetConfig("other", str(llm_folder)), root)
    said = tasks.build(root, "other", [write(tmp_path / "tasks.jsonl", asr("utt-003"), asr("utt-004"))])
    assert "1 left out" in said
    assert pq.read_table(table_path(root, "other")).column("utterance").to_pylist() == [4]


def test_nothing_but_quarantined_utterances_writes_nothing(root: Path, tmp_path: Path) -> None:
    path = root / "quarantine.parquet"
    bad = {"id": "lost", "reason": "silent", "detail": "no sound", "attempts": 1}
    pq.write_table(pa.Table.from_pylist([bad], schema=pq.read_schema(path)), path)
    builders.recommit(path)
    with pytest.raises(UserError, match=f"no instruction is about a committed utterance of {root}; nothing is written"):
        build(root, write(tmp_path / "tasks.jsonl", asr("lost")))
    assert not table_path(root).exists()


def test_another_tokenizer_in_the_llm_s_folder_is_refused(
    root: Path, llm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copytree(llm_folder, tmp_path / "llm"))
    settings = json.loads((other / "tokenizer.json").read_text())
    settings["model"]["merges"] = settings["model"]["merges"][:-3]
    (other / "tokenizer.json").write_text(json.dumps(settings))
    monkeypatch.setattr(tasks.checkpoints, "resolve", lambda *_: other)
    with pytest.raises(UserError, match=f"LLM {other} and target set {root}/targets/tiny: tokenizer_hash is"):
        build(root, write(tmp_path / "tasks.jsonl", asr("utt-000")))
    assert not table_path(root).exists()


def test_a_task_about_an_utterance_that_the_targets_do_not_cover_names_the_remedy(
    root: Path, llm_folder: Path, tmp_path: Path
) -> None:
    old = write(tmp_path / "old.jsonl", asr("utt-000"))
    build(root, old)
    before = state(table_path(root))
    (new,) = grow(root, ["the boat"], [40])
    both = write(tmp_path / "both.jsonl", asr("utt-000"), asr(new))
    with pytest.raises(UserError) as caught:
        build(root, both)
    assert str(caught.value) == (
        f"instructions are about 1 utterances that {root}/targets/tiny does not cover yet, such as {new!r}; give "
        f"--llm {llm_folder} to extend it"
    )
    assert build(root, old) == "tasks complete"
    assert state(table_path(root)) == before
    targets.build(targets.TargetConfig("tiny", str(llm_folder)), root)
    assert state(table_path(root)) == before
    assert "2 tasks" in build(root, both)
    assert pq.read_table(table_path(root)).column("utterance").to_pylist() == [0, 30]


def test_a_task_left_out_before_is_there_once_its_utterance_is(root: Path, llm_folder: Path, tmp_path: Path) -> None:
    """The instructions are the same; the utterance has come out of the shard set's quarantine."""
    path = root / "quarantine.parquet"
    bad = {"id": "new-30", "reason": "undecodable", "detail": "busy", "attempts": 1}
    pq.write_table(pa.Table.from_pylist([bad], schema=pq.read_schema(path)), path)
    builders.recommit(path)
    instructions = write(tmp_path / "tasks.jsonl", asr("utt-000"), asr("new-30"))
    assert build(root, instructions).endswith("1 left out, their utterances are in quarantine")
    grow(root, ["the boat"], [40])
    targets.build(targets.TargetConfig("tiny", str(llm_folder)), root)
    assert "2 tasks" in build(root, instructions)
