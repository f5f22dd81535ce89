"""An LLM's tokenizer: its hash, its pad, and whether it is the one that targets came from."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from sm_train.data.target_set import TargetSet
from sm_train.errors import UserError
from sm_train.models.tokenizer import Tokenizer, read_tokenizer, tokenizer_hash
from tests import builders


@pytest.fixture(scope="module")
def targets(shard_set: Path) -> TargetSet:
    return TargetSet(shard_set, "tiny")


def with_fewer_merges(llm_folder: Path, folder: Path) -> Path:
    shutil.copytree(llm_folder, folder)
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["model"]["merges"] = settings["model"]["merges"][:-1]
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    return folder


def test_ids_and_text_are_one_another_s_inverse(llm_folder: Path) -> None:
    made = Tokenizer(llm_folder, None)
    ids = made.ids("the red boat")
    assert made.inner.bos_token_id not in ids
    assert made.text(ids) == "the red boat"
    assert made.text([made.inner.bos_token_id, *ids, made.pad_id]) == "the red boat"


@pytest.mark.parametrize(("pad_token", "warns"), [("</s>", True), ("<pad>", False), (None, False)])
def test_a_pad_that_ends_a_sequence_is_a_warning_with_the_remedy(
    llm_folder: Path, capsys: pytest.CaptureFixture[str], pad_token: str | None, warns: bool
) -> None:
    made = Tokenizer(llm_folder, pad_token)
    assert made.pad_is_eos is warns
    made.warn_of_pad()
    out = capsys.readouterr().out
    assert out.count("\n") == warns
    if warns:
        assert f"warning: LLM {llm_folder}: pad_token '</s>' also ends a sequence" in out
        assert "name a reserved token as pad_token in the targets' config" in out


def test_the_hash_follows_everything_that_ids_follow_from(llm_folder: Path, tmp_path: Path) -> None:
    own = tokenizer_hash(read_tokenizer(llm_folder))
    assert own == tokenizer_hash(read_tokenizer(Path(shutil.copytree(llm_folder, tmp_path / "same"))))
    assert own != tokenizer_hash(read_tokenizer(with_fewer_merges(llm_folder, tmp_path / "fewer")))
    added = read_tokenizer(llm_folder)
    added.add_tokens(["<new>"])
    assert own != tokenizer_hash(added)


def test_the_hash_does_not_follow_what_was_tokenised(llm_folder: Path) -> None:
    """Padding and truncation are settings of a call that stay in a fast tokenizer."""
    made = read_tokenizer(llm_folder)
    own = tokenizer_hash(made)
    made("the red boat", add_special_tokens=False)
    assert tokenizer_hash(made) == own


def test_the_targets_own_tokenizer_and_pad_are_accepted(llm_folder: Path, targets: TargetSet) -> None:
    Tokenizer(llm_folder, None).require_same_as(targets)
    Tokenizer(llm_folder, targets.contract["pad_token"]).require_same_as(targets)


def test_another_pad_is_refused(llm_folder: Path, targets: TargetSet) -> None:
    with pytest.raises(UserError, match=rf"LLM {llm_folder} and target set {targets.root}: pad_id is 2 there, but 3"):
        Tokenizer(llm_folder, "<spare>").require_same_as(targets)


def test_another_tokenizer_is_refused_and_the_llm_of_the_targets_is_named(
    llm_folder: Path, targets: TargetSet, tmp_path: Path
) -> None:
    other = Tokenizer(with_fewer_merges(llm_folder, tmp_path / "other"), None)
    own = targets.contract["tokenizer_hash"]
    remedy = re.escape(f"name the LLM that the targets came from ({llm_folder}), or make targets for this one")
    with pytest.raises(UserError, match=f"tokenizer_hash is '{own}' there, but '.*' is asked for; {remedy}") as caught:
        other.require_same_as(targets)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"LLM {tmp_path}: its tokenizer cannot be loaded") as caught:
        read_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_pad_of_its_own_is_found_where_none_is_named(tmp_path: Path) -> None:
    builders.tokenizer(tmp_path / "own")
    assert Tokenizer(tmp_path / "own", None).pad_token == "<pad>"
    builders.tokenizer(tmp_path / "none", pad_token=None)
    with pytest.raises(UserError, match="has no pad token; name one as pad_token"):
        Tokenizer(tmp_path / "none", None)
