"""The config of precompute, and its runs without a model; those with one are in tests/integration."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import yaml

from cluster import precompute as over_ray
from sm_train import config, precompute
from sm_train.data import owner, shards, store
from sm_train.errors import UserError
from sm_train.models.speech import EncoderConfig
from sm_train.precompute import PrecomputeConfig, run, run_share
from sm_train.records import Receipt, Unit
from tests.chaos import sets

CFG = PrecomputeConfig("m.parquet", "sets/mine", EncoderConfig(path="e"))


@pytest.mark.parametrize(
    ("log", "out", "file"),
    [
        ("auto", "sets/mine", Path("sets/mine/log.jsonl")),
        ("auto", "s3://bucket/mine", None),
        ("none", "sets/mine", None),
        ("logs/x.jsonl", "s3://bucket/mine", Path("logs/x.jsonl")),
    ],
)
def test_measurements_lie_in_a_local_sets_folder_unless_asked_otherwise(log: str, out: str, file: Path | None) -> None:
    assert precompute._log_file(replace(CFG, log=log, out=out)) == file


@pytest.mark.parametrize("name", ["unit_utterances", "batch_s", "threads", "actors", "decode_workers"])
def test_what_must_be_above_zero_is(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0"):
        replace(CFG, **{name: 0})


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_s", float("nan")), ("max_duration_s", 0), ("max_quarantined_share", 5), ("silence_dbfs", float("nan"))],
)
def test_numbers_that_mean_nothing_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is "):
        replace(CFG, **{name: value})


def test_a_part_that_is_lost_after_its_audio_was_mended_becomes_the_same_bytes(tmp_path: Path) -> None:
    """And nobody is committed twice: whom a round took up stays quarantined in the part that had them before."""
    root = tmp_path / "set"
    run(sets.job(tmp_path, root), sets.spread)
    run(sets.job(tmp_path, root, requeue=True), sets.spread)
    before = sets.contents(root)
    ids = shards.read_table(root, "utterances.parquet").column("id").to_pylist()
    assert sorted(ids) == [f"utt-{i:02}" for i in range(24)]
    store.at(root).remove("part-0000000", shards.DONE)
    (root / shards.DATASET).unlink()
    run(sets.job(tmp_path, root), partial(sets.spread, mended=True))
    assert sets.contents(root) == before


def test_an_utterance_in_two_parts_is_refused_and_the_set_stays(tmp_path: Path) -> None:
    root = tmp_path / "set"
    run(sets.job(tmp_path, root), sets.spread)
    before = sets.contents(root)
    names = shards.parts_of(root)
    place = store.at(root)
    for file in (shards.DONE, "index.json"):
        place.write(f"part-0000009/{file}", place.read(f"{names[0]}/{file}"))
    with pytest.raises(UserError, match="is in part-0000000 and in part-0000009; remove one"):
        shards.commit(root, [*names, "part-0000009"], {}, "utterances.parquet")
    assert sets.contents(root).items() >= before.items()


def test_who_finishes_an_interrupted_round_holds_the_lease(tmp_path: Path) -> None:
    root = tmp_path / "set"
    run(sets.job(tmp_path, root), sets.spread)

    def interrupted(cfg: PrecomputeConfig, units: Sequence[Unit]) -> Generator[Receipt, None, None]:
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        run(sets.job(tmp_path, root, requeue=True), interrupted)
    held = []

    def watched(cfg: PrecomputeConfig, units: Sequence[Unit]) -> Generator[Receipt, None, None]:
        held.append(owner.is_left(root))
        yield from sets.spread(cfg, units, mended=True)

    run(sets.job(tmp_path, root), watched)
    assert held == [True]
    assert shards.read_table(root, shards.QUARANTINE).num_rows == 0
    run(sets.job(tmp_path, root), lambda cfg, units: pytest.fail("no part needs encoding"))


@pytest.mark.parametrize("share", ["3/3", "1", "a/b", "-1/3", "0/0", "1/2/3", "1.0/3", " 0/3"])
def test_what_is_no_share_is_refused(share: str) -> None:
    with pytest.raises(ValueError, match=r"share is '.*'; it must be I/N with I from 0 to N - 1, as 0/3, 1/3 and 2/3"):
        replace(CFG, share=share)


def test_a_share_goes_without_requeue_and_without_ray(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="share is '0/3' and requeue is true"):
        replace(CFG, share="0/3", requeue=True)
    path = tmp_path / "cfg.yaml"
    path.write_text(yaml.safe_dump(config.to_mapping(replace(CFG, share="0/3"))))
    with pytest.raises(UserError, match="share is '0/3', but Ray shares the units among actors"):
        over_ray.main([str(path)])


def test_the_command_that_completes_a_set_names_no_share(tmp_path: Path) -> None:
    path = tmp_path / "my cfg.yaml"
    path.write_text("out: x\n")
    said = precompute._completing([str(path), "share=0/3", "out=s"])
    assert said == f"python -m sm_train.precompute '{path}' out=s"
    path.write_text("share: 0/3\n")
    assert precompute._completing([str(path)]).endswith("my cfg.yaml' share=")
    full = yaml.safe_dump({"manifest": "m", "out": "o", "share": "0/3", "encoder": {"path": "e"}})
    path.write_text(full)
    assert config.load(PrecomputeConfig, [str(path), "share="], "x").share is None


def test_shares_in_any_order_and_the_plain_command_make_the_bytes_of_one_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(sets.job(tmp_path, tmp_path / "whole"), sets.spread)
    root, taken = tmp_path / "set", dict[str | None, list[int]]()

    def spread(cfg: PrecomputeConfig, units: Sequence[Unit]) -> Generator[Receipt, None, None]:
        taken[cfg.share] = [unit.index for unit in units]
        yield from sets.spread(cfg, units)

    for share in ("2/3", "0/3"):
        run_share(sets.job(tmp_path, root, share=share), spread, "THE COMMAND")
    assert taken == {"2/3": [2, 5], "0/3": [0, 3, 6]}
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"{root}: share 0/3 is done, 3 parts; 3 of 8 are left to others; then: THE COMMAND"
    )
    assert not shards.is_complete(root)
    run_share(sets.job(tmp_path, root, share="2/3"), lambda cfg, units: pytest.fail("nothing to do"), "THE COMMAND")
    run(sets.job(tmp_path, root), spread)  # finds two shares there, and encodes the third
    assert taken[""] == [1, 4, 7]
    assert sets.contents(root) == sets.contents(tmp_path / "whole")
    capsys.readouterr()
    run_share(sets.job(tmp_path, root, share="1/3"), lambda cfg, units: pytest.fail("all is there"), "THE COMMAND")
    assert capsys.readouterr().out == f"{root}: complete, 24 utterances; its target sets: THE COMMAND\n"
    with pytest.raises(UserError, match=r"batch_s is 120\.0 there, but 7\.0 is asked for"):
        run_share(sets.job(tmp_path, root, share="1/3", batch_s=7.0), sets.spread, "")


def test_the_first_shares_contract_counts_before_it_has_a_part(tmp_path: Path) -> None:
    def fail(cfg: PrecomputeConfig, units: Sequence[Unit]) -> Generator[Receipt, None, None]:
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        run_share(sets.job(tmp_path, tmp_path / "set", share="0/3"), fail, "")
    other = sets.job(tmp_path, tmp_path / "set", share="1/3", batch_s=7.0)
    with pytest.raises(UserError, match=r"batch_s is 120\.0 there, but 7\.0 is asked for; give another folder"):
        run_share(other, sets.spread, "")
    assert store.at(tmp_path / "set").names() == [shards.CONTRACT]
    assert store.at(tmp_path / "set").names(owner.SHARES) == []


def test_a_share_counts_the_quarantined_against_the_whole_manifest(tmp_path: Path) -> None:
    """Its own first unit is bad altogether, and 3 of 24 rows are below what is allowed."""
    asked = {"share": "1/8", "max_quarantined_share": 0.2}
    run_share(sets.job(tmp_path, tmp_path / "set", **asked), sets.spread, "")
    assert shards.parts_of(tmp_path / "set") == ["part-0000001"]
    assert len(shards.read_part(tmp_path / "set", "part-0000001")["quarantined"]) == 3


def test_shares_and_a_driver_of_the_whole_set_refuse_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "BEAT_S", 0.05)
    root = tmp_path / "set"
    seen = []

    def rivals(cfg: PrecomputeConfig, units: Sequence[Unit]) -> Generator[Receipt, None, None]:
        beside = sets.job(tmp_path, root, share="1/3")
        for other in (sets.job(tmp_path, root), sets.job(tmp_path, root, share="0/3"), beside):
            held = beside is other and cfg.share
            try:
                run_share(other, sets.spread, "") if other.share else run(other, sets.spread)
                seen.append("ran")
            except UserError as error:
                seen.append(str(error).partition(" (host ")[0].removeprefix(f"{root}: "))
            assert held or seen[-1] != "ran"
        yield from sets.spread(cfg, units)

    run_share(sets.job(tmp_path, root, share="0/3"), rivals, "")
    assert seen == ["share 0/3 is at work there", "share 0/3 is at work there", "ran"]
    seen.clear()
    run(sets.job(tmp_path, root), rivals)
    assert seen == ["another driver is at work there"] * 3
    run(sets.job(tmp_path, tmp_path / "whole"), sets.spread)
    assert sets.contents(root) == sets.contents(tmp_path / "whole")
