from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from sm_train import files
from sm_train.data import shards
from sm_train.data.target_set import TargetSet
from sm_train.data.text import normalise
from sm_train.errors import UserError
from sm_train.models import targets
from sm_train.models.targets import TargetConfig, embedding_module, require_embeddings
from sm_train.models.tokenizer import Tokenizer
from tests import builders


@pytest.fixture
def copied(shard_set: Path, tmp_path: Path) -> Path:
    """A shard set of one's own, without targets."""
    shutil.copytree(shard_set, tmp_path / "set", ignore=shutil.ignore_patterns("targets"))
    return tmp_path / "set"


KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied, sharded": {"tie_word_embeddings": True, "sharded": True},
    "llama bf16, padded vocabulary": {"dtype": "bfloat16", "extra_rows": 61},
    "llama fp16": {"dtype": "float16"},
    "qwen2": {"family": "qwen2", "tie_word_embeddings": True, "dtype": "bfloat16"},
    "gemma2": {"family": "gemma2", "dtype": "bfloat16"},
    "gemma3": {"family": "gemma3_text", "dtype": "bfloat16"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_embedding_is_bit_for_bit_what_the_llm_computes(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = builders.llm(tmp_path / "llm", **KINDS[kind])
    whole = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings()
    ours = embedding_module(folder)
    ids = torch.arange(whole.weight.shape[0])
    with torch.inference_mode():
        theirs = whole(ids)
        assert ours(ids).dtype == theirs.dtype
        assert ours(ids).equal(theirs)
    scaled = kind.startswith("gemma")
    assert theirs.equal(whole.weight) is not scaled
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def without(folder: Path, ending: str) -> Path:
    from safetensors.torch import load_file

    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if not n.endswith(ending)}
    builders.save_weights(folder, tensors, sharded=False)
    return folder


def test_an_llm_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    untied = without(builders.llm(tmp_path / "untied"), "embed_tokens.weight")  # an lm_head is no input embedding
    with pytest.raises(UserError, match=r"no one input-embedding tensor .*embed_tokens.weight"):
        embedding_module(untied)
    odd = builders.llm(tmp_path / "odd")
    settings = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**settings, "hidden_size": 32}))
    with pytest.raises(UserError, match=r"has the shape \(\d+, 16\); its config says width 32"):
        embedding_module(odd)
    (odd / "config.json").write_text(json.dumps({**settings, "model_type": "unheard_of"}))
    with pytest.raises(UserError, match=r"config.json cannot be used .*unheard_of") as error:
        embedding_module(odd)
    assert "\n" not in str(error.value)


def test_a_pad_is_named_or_asked_for(tmp_path: Path) -> None:
    bare = builders.llm(tmp_path / "bare", pad_token=None)
    with pytest.raises(
        UserError, match=r"has no pad token; name one as pad_token \(special tokens: <s>, <pad>, <spare>\)"
    ):
        Tokenizer(bare, None)
    with pytest.raises(UserError, match=r"pad_token '<nope>' is not in its vocabulary \(special tokens: <s>"):
        Tokenizer(bare, "<nope>")
    named = Tokenizer(bare, "<spare>")
    assert (named.pad_token, named.pad_id, named.pad_is_eos) == ("<spare>", 3, False)
    assert Tokenizer(bare, "</s>").pad_is_eos
    assert named.text(named.ids("the red boat")) == "the red boat"
    shutil.rmtree(tmp_path / "bare")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="its tokenizer cannot be loaded") as error:
        Tokenizer(bare, None)
    assert "\n" not in str(error.value)


def test_a_target_set_gives_the_llms_own_vectors_for_every_text(shard_set: Path, llm_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llm, tokenizer = AutoModelForCausalLM.from_pretrained(llm_folder), AutoTokenizer.from_pretrained(llm_folder)
    found = TargetSet(shard_set, "tiny")
    utterances = shards.read_table(shard_set, "utterances.parquet")
    assert found.table.column("utterance").to_pylist() == list(range(30))
    squares = []
    for row, text in enumerate(utterances.column("text").to_pylist()):
        ids = tokenizer(normalise(text, "mms"), add_special_tokens=False)["input_ids"]
        rows_L = found.rows_of(row)
        assert found.token_ids[rows_L].tolist() == ids
        assert found.text(rows_L) == normalise(text, "mms")
        with torch.inference_mode():
            theirs_LD = llm.get_input_embeddings()(torch.tensor(ids))
        assert found.rows_RD[torch.from_numpy(rows_L)].equal(theirs_LD)
        squares.append(theirs_LD.double().square())
    assert found.rms**2 == pytest.approx(float(torch.cat(squares).mean()), rel=1e-9)
    pad = llm.get_input_embeddings().weight[tokenizer.pad_token_id]
    assert found.rows_RD[found.pad_row].equal(pad)
    assert found.contract["width"] == 16
    assert found.contract["dtype"] == "float32"


def test_building_again_does_nothing_and_another_contract_is_an_error(
    copied: Path, llm_folder: Path, tmp_path: Path
) -> None:
    cfg = TargetConfig("a", str(llm_folder))
    assert targets.build(cfg, copied)
    before = {p: p.stat().st_mtime_ns for p in (copied / "targets").rglob("*")}
    assert not targets.build(cfg, copied)
    assert {p: p.stat().st_mtime_ns for p in (copied / "targets").rglob("*")} == before
    for change, says in (
        ({"normaliser": "none"}, "normaliser is 'mms' there, but 'none'"),
        ({"pad_token": "<s>"}, "pad_token"),
    ):
        with pytest.raises(UserError, match=f"{says}.*remove .* to build it anew"):
            targets.build(TargetConfig("a", str(llm_folder), **change), copied)
    assert targets.build(TargetConfig("b", str(llm_folder), pad_token="<spare>"), copied)
    assert TargetSet(copied, "b").contract["pad_id"] == 3


def test_a_failed_llm_leaves_no_contract_behind(copied: Path, llm_folder: Path, tmp_path: Path) -> None:
    broken = without(builders.llm(tmp_path / "broken"), "embed_tokens.weight")
    with pytest.raises(UserError, match="input-embedding"):
        targets.build(TargetConfig("a", str(broken)), copied)
    assert targets.build(TargetConfig("a", str(llm_folder)), copied)


@pytest.mark.parametrize(
    ("made", "pad_token", "says"),
    [
        ({}, "</s>", "pad_token '</s>' also ends a sequence"),
        ({"zero_pad": True}, None, "decode with trim: change_point"),
        ({}, None, ""),
    ],
)
def test_doubtful_pads_are_a_warning(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], made: dict[str, bool], pad_token: str, says: str
) -> None:
    folder = builders.llm(tmp_path / "llm", **made)
    targets.build(TargetConfig("a", str(folder), pad_token=pad_token), copied)
    out = capsys.readouterr().out
    assert says in out
    assert out.count("warning") == (1 if says else 0)


def test_a_pad_beyond_the_embedding_is_an_error(copied: Path, tmp_path: Path) -> None:
    folder = builders.llm(tmp_path / "llm")
    made = builders.tokenizer(folder, None)
    made.add_special_tokens({"pad_token": "<added>"})
    made.save_pretrained(folder)
    with pytest.raises(UserError, match=r"the pad '<added>' is \d+\), but its embedding has \d+ rows"):
        targets.build(TargetConfig("a", str(folder)), copied)


def test_texts_that_do_not_fit_are_quarantined(copied: Path, llm_folder: Path) -> None:
    table = pq.read_table(copied / "utterances.parquet")
    rows = table.to_pylist()
    rows[3]["text"], rows[4]["text"] = "zzz qqq " * 30, " ?! "
    builders.recommit(builders.write_manifest(copied / "utterances.parquet", rows))
    assert targets.build(TargetConfig("a", str(llm_folder)), copied)
    bad = pq.read_table(copied / "targets" / "a" / "quarantine.parquet").to_pylist()
    assert [(r["id"], r["reason"]) for r in bad] == [(rows[3]["id"], "too_many_tokens"), (rows[4]["id"], "empty_text")]
    found = TargetSet(copied, "a")
    assert found.table.column("utterance").to_pylist() == [i for i in range(30) if i not in (3, 4)]


def test_a_target_set_that_cannot_be_opened_says_why(copied: Path, llm_folder: Path) -> None:
    with pytest.raises(UserError, match="no complete target set 'a'; it has: none"):
        TargetSet(copied, "a")
    targets.build(TargetConfig("b", str(llm_folder)), copied)
    with pytest.raises(UserError, match="it has: b"):
        TargetSet(copied, "a")
    path = copied / "targets" / "b" / "embedding.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"embedding.safetensors is not what was committed"):
        TargetSet(copied, "b")
    path.write_bytes(whole)
    dataset = files.read_json(copied / "dataset.json")
    files.write_json(copied / "dataset.json", {**dataset, "part_hashes": "other"})
    with pytest.raises(UserError, match=r"the shard set has changed.*build the targets anew"):
        TargetSet(copied, "b")


def test_nothing_fits(copied: Path, llm_folder: Path) -> None:
    rows = pq.read_table(copied / "utterances.parquet").to_pylist()
    builders.recommit(builders.write_manifest(copied / "utterances.parquet", [{**row, "text": "?"} for row in rows]))
    with pytest.raises(UserError, match="not one transcript fits its utterance"):
        targets.build(TargetConfig("a", str(llm_folder)), copied)


def test_the_llm_of_the_targets_is_accepted_and_one_changed_row_is_refused(
    shard_set: Path, llm_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    found = TargetSet(shard_set, "tiny")
    require_embeddings(llm_folder, found)
    other = Path(shutil.copytree(llm_folder, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.embed_tokens.weight"][int(found.token_ids[-1]), 0] += 1e-6
    builders.save_weights(other, tensors, sharded=False)
    remedy = f"name the LLM that the targets came from \\({llm_folder}\\)"
    with pytest.raises(UserError, match=f"LLM {other} does not embed tokens as target set {found.root}.*{remedy}"):
        require_embeddings(other, found)


def test_an_embedding_of_fewer_rows_or_another_width_is_refused(shard_set: Path, tmp_path: Path) -> None:
    found = TargetSet(shard_set, "tiny")
    for name, change in (("short", {"extra_rows": -200}), ("wide", {"hidden_size": 24})):
        with pytest.raises(UserError, match="does not embed tokens as target set"):
            require_embeddings(small_llm(tmp_path / name, **change), found)


def small_llm(folder: Path, extra_rows: int = 0, hidden_size: int = 16) -> Path:
    from safetensors.torch import load_file

    made = builders.llm(folder)
    tensors = load_file(made / "model.safetensors")
    table_VD = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.ones(len(table_VD) + extra_rows, hidden_size)
    builders.save_weights(made, tensors, sharded=False)
    settings = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**settings, "hidden_size": hidden_size}))
    return made
