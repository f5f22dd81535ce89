from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from sm_train import files
from sm_train.data import shards
from sm_train.data.batches import SpeechItems
from sm_train.data.target_set import TargetSet
from sm_train.data.text import normalise
from sm_train.errors import UserError
from sm_train.models import targets
from sm_train.models.targets import TargetConfig
from sm_train.models.tokenizer import Tokenizer
from tests import builders
from tests.growing import grow


@pytest.fixture
def copied(shard_set: Path, tmp_path: Path) -> Path:
    """A shard set of one's own, without targets."""
    shutil.copytree(shard_set, tmp_path / "set", ignore=shutil.ignore_patterns("targets"))
    return tmp_path / "set"


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
    broken = builders.without(builders.llm(tmp_path / "broken"), "embed_tokens.weight")
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
    dataset = files.read_json(path.parent / "dataset.json")
    files.write_json(path.parent / "dataset.json", {n: v for n, v in dataset.items() if n != "covers"})
    with pytest.raises(UserError, match=r"has no covers: an older version wrote it; remove .* and build"):
        TargetSet(copied, "b")


def test_nothing_fits(copied: Path, llm_folder: Path) -> None:
    rows = pq.read_table(copied / "utterances.parquet").to_pylist()
    builders.recommit(builders.write_manifest(copied / "utterances.parquet", [{**row, "text": "?"} for row in rows]))
    with pytest.raises(UserError, match="not one transcript fits its utterance"):
        targets.build(TargetConfig("a", str(llm_folder)), copied)


# ---- a shard set that grows

MORE = ["the old boat runs", "two stones two birds", "the zebra"]
FRAMES = [60, 60, 80]


def built(root: Path, llm: Path, name: str = "a", store: str = "ids") -> TargetConfig:
    cfg = TargetConfig(name, str(llm), store=store)
    targets.build(cfg, root)
    return cfg


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_targets_of_a_set_that_has_grown_are_used_as_far_as_they_go(
    copied: Path, llm_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built(copied, llm_folder)
    before = SpeechItems(copied, TargetSet(copied, "a"), ["train"]).ids
    covers = TargetSet(copied, "a").contract["covers"]
    assert (covers["num_utterances"], covers["num_parts"]) == (30, 4)
    assert not capsys.readouterr().out
    grow(copied, MORE, FRAMES)
    found = TargetSet(copied, "a")
    assert capsys.readouterr().out == (
        f"{found.root} does not cover the last 3 of 33 utterances, which are left out; to have them run precompute or "
        "cluster.retarget again with this LLM\n"
    )
    items = SpeechItems(copied, found, ["train"])
    assert items.ids == before
    items.collate(np.arange(len(items)))


def changed(column: str) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    return lambda rows: [{**row, column: row[column] + ("x" if i == 7 else "")} for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    "change",
    [changed("text"), changed("xxh3"), changed("id"), lambda rows: rows[1::-1] + rows[2:], lambda rows: rows[1:]],
    ids=["text", "features", "id", "order", "fewer"],
)
@pytest.mark.parametrize("is_complete", [True, False])
def test_targets_of_other_utterances_are_refused(
    copied: Path, llm_folder: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], is_complete: bool
) -> None:
    cfg = built(copied, llm_folder)
    grow(copied, MORE[:1], FRAMES[:1])
    if not is_complete:
        (copied / "targets/a/dataset.json").unlink()
    rows = pq.read_table(copied / "utterances.parquet").to_pylist()
    builders.recommit(builders.write_manifest(copied / "utterances.parquet", change(rows)))
    before, says = (
        contents(copied / "targets"),
        r"utterances_hash is .* the shard set has changed: remove .* and build the targets anew",
    )
    with pytest.raises(UserError, match=says):
        targets.build(cfg, copied)
    assert contents(copied / "targets") == before
    if is_complete:
        with pytest.raises(UserError, match=says):
            TargetSet(copied, "a")


@pytest.mark.parametrize("store", ["ids", "vectors"])
def test_a_set_is_extended_and_nothing_of_it_is_written_again(
    copied: Path, llm_folder: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    monkeypatch.setattr(targets, "PART_UTTERANCES", 8)
    cfg = built(copied, llm_folder, store=store)
    old, root = TargetSet(copied, "a"), copied / "targets/a"
    (root / "tasks.parquet").write_bytes(b"as it was")
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in [*root.glob("part-*/*"), root / "tasks.parquet"]}
    for count, texts in ((33, MORE), (34, ["zebra seat"])):
        grow(copied, texts, FRAMES[: len(texts)])
        assert targets.build(cfg, copied)
        assert not targets.build(cfg, copied)
        assert TargetSet(copied, "a").contract["covers"]["num_utterances"] == count
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before
    extended = TargetSet(copied, "a")
    assert extended.contract["extended_at"] == [30, 33]
    assert extended.table.column("part").to_pylist()[24:] == ["part-0000003"] * 6 + ["part-0000004"] * 3 + [
        "part-0000005"
    ]
    assert set(extended.token_ids) > set(old.token_ids)
    built(copied, llm_folder, "anew", store)
    anew = TargetSet(copied, "anew")
    for name in ("id", "utterance", "num_tokens", "xxh3"):
        assert extended.table.column(name).equals(anew.table.column(name))
    assert extended.rows_RD.equal(anew.rows_RD)
    assert extended.rms == anew.rms
    assert all((extended.rows_of(i) == anew.rows_of(i)).all() for i in range(34))
    assert [extended.text(extended.rows_of(i)) for i in range(30, 33)] == MORE


def test_the_set_s_own_quarantine_is_told_and_grows_with_it(copied: Path, llm_folder: Path) -> None:
    cfg, root = TargetConfig("a", str(llm_folder)), copied / "targets/a"
    assert targets.make(cfg, copied) == "built, 30 utterances"
    ids = grow(copied, ["the", "boat " * 90, "bird " * 90, " ?! "], [60, 60, 60, 60])
    says = "31 utterances, 3 quarantined (2 too_many_tokens, 1 empty_text)"
    assert targets.make(cfg, copied) == f"extended, {says}"
    assert targets.make(cfg, copied) == f"complete, {says}"
    assert pq.read_table(root / "quarantine.parquet").column("id").to_pylist() == ids[1:]


def test_an_llm_whose_weights_have_changed_extends_nothing(copied: Path, tmp_path: Path) -> None:
    folder = builders.llm(tmp_path / "llm")
    cfg = built(copied, folder)
    grow(copied, MORE, FRAMES)
    before = contents(copied / "targets")
    shutil.rmtree(folder)
    tensors = load_file(builders.llm(folder) / "model.safetensors")
    tensors["model.embed_tokens.weight"][5, 0] += 1
    builders.save_weights(folder, tensors, sharded=False)
    with pytest.raises(UserError, match=r"llm_embedding_hash is .* remove .* to build it anew, or give another name"):
        targets.build(cfg, copied)
    assert contents(copied / "targets") == before


class Killed(BaseException):
    """The process is dead: nothing that it would still have done is done."""


def dies_before(patch: pytest.MonkeyPatch, call: int) -> list[str]:
    """Let every call that names or removes a file fail from a given one on; returns the calls."""
    calls: list[str] = []

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, **kwargs: Any) -> Any:
            calls.append(f"{name} {Path(args[0]).name}")
            if len(calls) > call:
                raise Killed
            return real(*args, **kwargs)

        return made

    for name in ("replace", "rename", "unlink", "mkdir"):
        patch.setattr(os, name, counted(name, getattr(os, name)))
    return calls


@pytest.mark.parametrize("begin", ["new", "grown"])
def test_killed_at_any_point_it_is_as_it_was_or_openly_incomplete_and_completed(
    copied: Path, llm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin: str
) -> None:
    monkeypatch.setattr(targets, "PART_UTTERANCES", 20)
    cfg = TargetConfig("a", str(llm_folder))
    if begin == "grown":
        built(copied, llm_folder)
    grow(copied, MORE, FRAMES)
    start = Path(shutil.copytree(copied, tmp_path / "start"))
    targets.build(cfg, copied)
    whole, seen = contents(copied / "targets"), Counter[str]()
    for call in range(100):
        shutil.rmtree(copied / "targets")
        if begin == "grown":
            shutil.copytree(start / "targets", copied / "targets")
        with monkeypatch.context() as patch:
            calls = dies_before(patch, call)
            with suppress(Killed):
                targets.build(cfg, copied)
        if len(calls) <= call:
            break
        found = contents(copied / "targets")
        if "a/dataset.json" not in found:
            state = "incomplete"
            with pytest.raises(UserError, match="no complete target set 'a'"):
                TargetSet(copied, "a")
        else:
            leftovers = {name for name in found if ".aside-" in name}
            state = "whole" if "a/part-0000002/_DONE.json" in found or begin == "new" else "as it was"
            kept = {name: found[name] for name in found.keys() - leftovers}
            assert kept == (whole if state == "whole" else contents(start / "targets"))
            assert len(TargetSet(copied, "a").table) == (33 if state == "whole" else 30)
        seen[state] += 1
        targets.build(cfg, copied)
        assert contents(copied / "targets") == whole, calls
    assert contents(copied / "targets") == whole
    assert seen["incomplete"] > 8
    assert set(seen) == {"incomplete", "whole"} | ({"as it was"} if begin == "grown" else set())


def test_an_extension_that_was_cut_short_goes_on_with_a_set_that_has_grown_again(
    copied: Path, llm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = built(copied, llm_folder)
    before = contents(copied / "targets/a/part-0000000")
    grow(copied, MORE, FRAMES)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "commit", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            targets.build(cfg, copied)
    grow(copied, MORE[:1], FRAMES[:1])
    targets.build(cfg, copied)
    found = TargetSet(copied, "a")
    assert found.table.column("utterance").to_pylist() == list(range(34))
    assert found.contract["extended_at"] == [30, 33]
    assert contents(copied / "targets/a/part-0000000") == before
