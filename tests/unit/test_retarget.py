"""The command that gives a shard set the targets of another LLM, and a target set its tasks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster import retarget
from sm_train import files
from sm_train.data.target_set import TargetSet
from sm_train.errors import UserError
from sm_train.models import targets
from tests import builders, tuning
from tests.growing import grow
from tests.tuning import asr, table_path, write


@pytest.fixture
def root(shard_set: Path, tmp_path: Path) -> Path:
    """A shard set of one's own, without tasks."""
    return Path(shutil.copytree(shard_set, tmp_path / "set"))


def contents(root: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in root.rglob("*") if path.is_file()}


# ---- targets


def test_an_llm_becomes_a_target_set_as_precompute_would_make_it(
    root: Path, llm_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(root)
    retarget.main([str(root), "--llm", str(llm_folder), "--name", "again"])
    assert capsys.readouterr().out == f"{root}/targets/again: built, 30 utterances\n"
    assert {path: state for path, state in contents(root).items() if path in before} == before
    for path in (root / "targets/tiny").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (root / "targets/again" / path.relative_to(root / "targets/tiny")).read_bytes()
    made = contents(root)
    retarget.main([str(root), "--llm", str(llm_folder), "--name", "again"])
    assert capsys.readouterr().out == f"{root}/targets/again: complete, 30 utterances\n"
    assert contents(root) == made


def test_every_option_of_the_targets_config_is_passed_on(root: Path, llm_folder: Path) -> None:
    words = ["--pad-token", "<spare>", "--normaliser", "none", "--store", "vectors", "--revision", "main"]
    retarget.main([str(root), "--llm", str(llm_folder), "--name", "other", *words])
    contract = TargetSet(root, "other").contract
    asked = {name: contract[name] for name in ("pad_token", "normaliser", "store", "llm_revision", "llm")}
    assert asked == {
        "pad_token": "<spare>", "normaliser": "none", "store": "vectors", "llm_revision": "main",
        "llm": str(llm_folder),
    }  # fmt: skip


def test_targets_and_their_tasks_in_one_command(
    root: Path, llm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "tasks.jsonl", asr("utt-000"), asr("utt-003"))
    words = [str(root), "--llm", str(llm_folder), "--name", "two", "--instructions", str(path)]
    retarget.main(words)
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{root}/targets/two: built, 30 utterances"
    assert second.startswith(f"{root}/targets/two: 2 tasks (2 asr)")
    retarget.main(words)
    assert capsys.readouterr().out == (
        f"{root}/targets/two: complete, 30 utterances\n{root}/targets/two: tasks complete\n"
    )


def test_a_set_that_has_grown_is_extended_and_its_new_utterances_get_tasks(
    root: Path, llm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (new,) = grow(root, ["the boat"], [40])
    path = write(tmp_path / "tasks.jsonl", asr("utt-000"), asr(new))
    retarget.main([str(root), "--llm", str(llm_folder), "--name", "tiny", "--instructions", str(path)])
    assert capsys.readouterr().out.startswith(f"{root}/targets/tiny: extended, 31 utterances\n")
    assert pq.read_table(table_path(root)).column("id").to_pylist() == ["utt-000", new]


def test_mistakes_are_one_line(root: Path, llm_folder: Path, tmp_path: Path) -> None:
    llm = ["--llm", str(llm_folder), "--name", "x"]
    for words, says in (
        ([], "nothing to do: give --llm for targets of an LLM, --instructions for tasks, or both"),
        (["--llm", str(llm_folder)], "name the target set with --name"),
        ([*llm, "--store", "both"], "store is 'both'; it must be one of ids, vectors"),
        ([*llm, "--normaliser", "all"], "normaliser is 'all'; it must be one of mms, none"),
        ([*llm, "--pad-token", "<nope>"], "pad_token '<nope>' is not in its vocabulary"),
        (["--llm", str(llm_folder), "--name", "../x"], "name is '../x'; it must be the name of a folder"),
        (["--llm", str(llm_folder), "--name", "tiny", "--store", "vectors"], "store is 'ids' there, but 'vectors'"),
        (["--llm", str(tmp_path / "none"), "--name", "x"], "none: the folder does not exist"),
        (["--instructions", "f", "--pad-token", "<s>"], "--pad-token says how targets are made; give their LLM"),
        (["--instructions", "f", "--store", "ids"], "--store says how targets are made; give their LLM with --llm"),
    ):
        with pytest.raises(UserError) as caught:
            retarget.main([str(root), *words])
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)
    assert [path.name for path in (root / "targets").iterdir()] == ["tiny"]
    with pytest.raises(UserError, match=f"shard set {tmp_path / 'no'} does not exist, or is not complete"):
        retarget.main([str(tmp_path / "no"), *llm])
    assert not (tmp_path / "no").exists()


def test_as_a_command_a_mistake_is_one_line_and_code_2(root: Path) -> None:
    done = builders.run_module("cluster.retarget", root, "--llm", root / "none", "--name", "x")
    assert done.returncode == 2
    assert done.stderr == f"error: LLM {root}/none: the folder does not exist\n"


# ---- tasks


def test_the_command_picks_the_only_target_set(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [write(tmp_path / f"{i}.jsonl", asr(f"utt-00{i}")) for i in range(2)]
    retarget.main([str(root), "--instructions", *map(str, paths)])
    assert capsys.readouterr().out.startswith(f"{root}/targets/tiny: 2 tasks (2 asr)")
    retarget.main([str(root), "--instructions", *map(str, paths)])
    assert capsys.readouterr().out == f"{root}/targets/tiny: tasks complete\n"


def test_of_two_target_sets_the_command_asks_for_a_name(root: Path, llm_folder: Path, tmp_path: Path) -> None:
    targets.build(targets.TargetConfig("spare", str(llm_folder), pad_token="<spare>"), root)
    words = [str(root), "--instructions", str(write(tmp_path / "tasks.jsonl", asr("utt-000")))]
    with pytest.raises(UserError, match=r"has 2 target sets \(spare, tiny\); choose with --name"):
        retarget.main(words)
    assert not table_path(root).exists()
    retarget.main([*words, "--name", "spare"])
    assert table_path(root, "spare").exists()
    assert not table_path(root).exists()
    assert TargetSet(root, "spare").contract["pad_id"] == 3
    with pytest.raises(UserError, match="no complete target set 'other'; it has: spare, tiny"):
        retarget.main([*words, "--name", "other"])


def test_a_target_set_that_is_not_complete_is_not_picked(root: Path, llm_folder: Path, tmp_path: Path) -> None:
    files.write_json(root / "targets/half/contract.json", {})
    retarget.main([str(root), "--instructions", str(write(tmp_path / "tasks.jsonl", asr("utt-000")))])
    assert table_path(root).exists()


@pytest.mark.parametrize("make", [False, True], ids=["no folder", "no target set"])
def test_a_set_without_targets_is_not_told_to_choose_among_none(tmp_path: Path, make: bool) -> None:
    root = tmp_path / "set"
    if make:
        tuning.spoken(root, ["the boat"], [20])
    with pytest.raises(UserError) as caught:
        retarget.main([str(root), "--instructions", str(write(tmp_path / "tasks.jsonl", asr("utt-0")))])
    assert str(root) in str(caught.value)
    assert "choose with --name" not in str(caught.value)


def test_instructions_that_are_not_there_are_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"file {tmp_path / 'none.jsonl'} does not exist"):
        retarget.main([str(root), "--instructions", str(tmp_path / "none.jsonl")])
