from __future__ import annotations

import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sm_train import files
from sm_train.data import mds, shards
from sm_train.errors import UserError
from sm_train.models.speech import EncoderConfig
from sm_train.precompute import PrecomputeConfig, in_this_process, run
from tests import builders, hostile, storage
from tools.verify import __main__ as verify
from tools.verify import reencode

SHARD = "part-0000001/shard.00000.mds"


@pytest.fixture
def copied(shard_set: Path, tmp_path: Path) -> Path:
    shutil.copytree(shard_set, tmp_path / "set")
    return tmp_path / "set"


def says(capsys: pytest.CaptureFixture[str], *argv: object) -> list[str]:
    """The problems that the command names; it must leave with 2."""
    with pytest.raises(SystemExit) as end:
        verify.main([*map(str, argv)])
    assert end.value.code == 2
    head, *problems, tail = capsys.readouterr().out.splitlines()
    assert " MB/s" in head
    problems = [line for line in problems if "encoded again" not in line]
    assert tail == f"{len(problems)} problems"
    return problems


def test_a_whole_set_with_its_targets_and_manifest_is_found_whole(
    shard_set: Path, manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verify.main([str(shard_set), "--targets", "--manifest", str(manifest), "--jobs", "3"])
    head, tail = capsys.readouterr().out.splitlines()
    assert head.startswith(f"{shard_set}: 30 utterances, 5 parts, ")
    assert tail == "no problem found"
    sizes = [p.stat().st_size for p in shard_set.rglob("*") if p.suffix in (".mds", ".parquet", ".safetensors")]
    assert float(head.split(", ")[2].removesuffix(" MB")) >= round(sum(sizes) / 1e6, 1)


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def change(path: Path, **values: Any) -> None:
    files.write_json(path, {**files.read_json(path), **values})


DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a bit of a sample": (lambda s: flip(s / SHARD), [r"shard.00000.mds: its xxh3 is", r"'utt-015': its xxh3 is"]),
    "a shard cut short": (
        lambda s: (s / SHARD).write_bytes((s / SHARD).read_bytes()[:-1]),
        ["its xxh3 is", "index.json: it cannot be read|has .* bytes", "is not a whole MDS shard"],
    ),
    "a shard away": (lambda s: (s / SHARD).unlink(), ["is not there"]),
    "a stranger's file": (lambda s: (s / "part-0000002/more.mds").touch(), ["_DONE.json does not name it"]),
    "a part that is not whole": (lambda s: (s / "part-0000009").mkdir(), ["has no _DONE.json"]),
    "a part away": (
        lambda s: shutil.rmtree(s / "part-0000003"),
        ["names the part 'part-0000003'", "30 rows against 24 of the parts|from row 24", "part_hashes", "num_parts",
         "names a shard that no part has"],
    ),
    "a part's record changed": (
        lambda s: change(s / "part-0000000/_DONE.json", facts={"width": 31}),
        ["width is 32, not 31|facts|width is 31, not 32", "part_hashes is"],
    ),
    "the table changed": (lambda s: flip(s / "utterances.parquet", 60), ["not the table that was committed"]),
    "dataset.json says another layer": (lambda s: change(s / "dataset.json", layer=1), ["layer is 1, not 2"]),
    "dataset.json counts otherwise": (
        lambda s: change(s / "dataset.json", num_committed=29), ["num_committed is 29, not 30"]),
    "dataset.json away": (lambda s: (s / "dataset.json").unlink(), ["the set is not complete"]),
    "a row's text changed": (
        lambda s: hostile.rewrite_table(s, lambda row: row.update(text="other")),
        ["not the parts' rows in order; from row 0 on: text is 'other'"],
    ),
    "index.json lacks a shard": (
        lambda s: change(s / "index.json", shards=files.read_json(s / "index.json")["shards"][1:]),
        ["index.json: it lacks, or gives otherwise, the shard: 'part-0000000/shard.00000.mds'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_kind_of_damage_is_named(copied: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    harm, wanted = DAMAGE[damage]
    harm(copied)
    found = says(capsys, copied)
    for pattern in wanted:
        assert any(re.search(pattern, line) for line in found), (pattern, found)
    assert all(line.startswith(str(copied)) and "; " in line for line in found)


def test_all_problems_are_reported_and_nothing_stops_at_the_first(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(copied / SHARD)
    (copied / "part-0000000/_DONE.json").write_text("{")
    flip(copied / "targets/tiny/embedding.safetensors")
    found = "\n".join(says(capsys, copied, "--targets"))
    for what in ("part-0000001/shard.00000.mds", "part-0000000/_DONE.json", "tiny/embedding.safetensors"):
        assert what in found


TARGET_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "tokenizer": (lambda t: flip(t / "tokenizer.json", 60), "tokenizer.json: tokenizer_hash is"),
    "width": (lambda t: change(t / "dataset.json", width=17), "embedding.safetensors: width is 17, not 16"),
    "pad": (lambda t: change(t / "dataset.json", pad_id=399), "the pad's id 399 is not in it"),
    "state": (
        lambda t: change(t / "dataset.json", covers={"num_utterances": 3, "utterances_hash": "0"}),
        "another state of the shard set",
    ),
    "tasks": (lambda t: (t / "tasks.parquet").write_bytes(b"PAR1"), "tasks.parquet: it cannot be read"),
}


@pytest.mark.parametrize("damage", TARGET_DAMAGE)
def test_damage_of_a_target_set_is_named(copied: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    harm, wanted = TARGET_DAMAGE[damage]
    harm(copied / "targets/tiny")
    assert wanted in "\n".join(says(capsys, copied, "--targets"))
    verify.main([str(copied)])  # the features are whole


def test_tokens_must_fit_their_positions_and_the_embedding(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copied / "targets/tiny" / hostile.SHARD
    data = bytearray(path.read_bytes())
    end = struct.unpack_from("<I", data, 8)[0]
    data[end - 4 : end] = np.array([399], "<i4").tobytes()  # the last token of the first utterance
    path.write_bytes(data)
    begin = struct.unpack_from("<I", data, 4)[0]
    done_path = path.parent / shards.DONE
    done = files.read_json(done_path)
    done["rows"][0]["xxh3"] = mds.digest(bytes(data[begin:end]))
    done["files"][path.name] = mds.file_digest(path)
    files.write_json(done_path, done)
    hostile.rewrite_table(copied, lambda row: row.update(num_frames=4))
    found = "\n".join(says(capsys, copied, "--targets"))
    assert "'utt-000': " in found
    assert "tokens do not fit 1 positions" in found
    hostile.rewrite_table(copied, lambda row: row.update(num_frames=4000))
    assert "its token 399 is not in embedding.safetensors" in "\n".join(says(capsys, copied, "--targets"))


def test_inputs_are_committed_or_quarantined(
    shard_set: Path, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pq.read_table(manifest).to_pylist()
    other = builders.write_manifest(tmp_path / "m.parquet", [*rows[2:], {**rows[0], "id": "new"}])
    found = says(capsys, shard_set, "--manifest", other)
    assert "1 ids are neither committed nor quarantined: 'new'" in found[0]
    assert "2 ids are unknown to it: 'utt-000', 'utt-001'" in found[1]
    assert "manifest_hash" in found[2]


def test_units_encoded_again_are_the_same_bits(
    shard_set: Path, manifest: Path, encoder_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = ["--sample", "9", "--manifest", str(manifest), "--encoder", str(encoder_folder)]
    verify.main([str(shard_set), *again])
    said = capsys.readouterr().out.splitlines()
    assert "compared bit for bit" in said[1]
    count = int(said[1].split()[0])
    assert 9 <= count <= 16
    assert f"{count} are equal, the largest difference of a number is 0" in said[1]


def test_features_of_another_machine_are_compared_within_a_tolerance(
    copied: Path, manifest: Path, encoder_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = ["--sample", "30", "--manifest", str(manifest), "--encoder", str(encoder_folder)]

    def nudge(data: bytes) -> bytes:
        feats = np.frombuffer(data[11:-7], np.float16) * np.float16(1.001)
        return data[:11] + feats.tobytes() + data[-7:]

    hostile.rewrite_sample(copied, nudge)
    (problem,) = says(capsys, copied, *again)
    assert "'utt-000': its features differ by up to" in problem
    assert "must be the same bits here" in problem
    for name in ("contract.json", "dataset.json"):
        change(copied / name, software={"torch": "1.0"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(reencode.TOLERANCE, "float32", 3e-3)
        verify.main([str(copied), *again])
        said = capsys.readouterr().out
        assert "not bit for bit, since software is {'torch': '1.0'}, not {" in said
        assert ": 29 are equal, the largest difference of a number is 0.00" in said
        patch.setitem(reencode.TOLERANCE, "float32", 3e-4)
        (problem,) = says(capsys, copied, *again)
        assert "of their norm; 0.0003 is allowed" in problem


def test_another_encoder_is_named(
    shard_set: Path, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = builders.seamless(tmp_path / "other")
    flip(other / "model.safetensors", -30_000)
    found = says(capsys, shard_set, "--sample", "1", "--manifest", manifest, "--encoder", other)
    assert "encoder_hash is" in found[0]


# --- sets with rounds of mended audio


@pytest.fixture(scope="module")
def requeued(manifest: Path, encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A set that lacked the audio of 3, 11, 12 and 29, of which all but 11 were mended and run again; its manifest."""
    folder = tmp_path_factory.mktemp("requeued")
    shutil.copytree(manifest.parent, folder / "corpus")
    path = folder / "corpus" / manifest.name
    encoder = EncoderConfig(path=str(encoder_folder), layer=2, device="cpu")
    cfg = PrecomputeConfig(
        str(path), str(folder / "set"), encoder, [], unit_utterances=8, batch_s=12.0, max_quarantined_share=0.2
    )
    names = [folder / f"corpus/audio/{i:03d}.flac" for i in (3, 11, 12, 29)]
    for name in names:
        name.rename(name.with_suffix(".away"))
    run(cfg, in_this_process)
    for name in (names[0], names[2], names[3]):
        name.with_suffix(".away").rename(name)
    run(replace(cfg, requeue=True), in_this_process)
    return folder / "set", path


def test_a_set_with_a_round_is_found_whole_and_encodes_to_the_same_bits(
    requeued: tuple[Path, Path], encoder_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, path = requeued
    (row,) = pq.read_table(root / shards.QUARANTINE).to_pylist()
    assert (row["id"], row["attempts"]) == ("utt-011", 2)
    verify.main([str(root), "--manifest", str(path)])
    head, tail = capsys.readouterr().out.splitlines()
    assert ": 29 utterances, 5 parts, " in head
    assert tail == "no problem found"
    verify.main([str(root), "--manifest", str(path), "--sample", "30", "--encoder", str(encoder_folder)])
    _, said, tail = capsys.readouterr().out.splitlines()
    assert said.startswith("29 utterances encoded again and compared bit for bit: 29 are equal")
    assert tail == "no problem found"


def test_a_round_that_has_only_begun_is_not_encoded_again(
    copied: Path, manifest: Path, encoder_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"id": "utt-003", "reason": "silent", "detail": "", "attempts": 1}
    begun = {"first_part": "part-0000004", "rows": [row], "is_over": False}
    files.write_json(copied / "requeue-0001.json", begun)
    again = ["--sample", "30", "--manifest", str(manifest), "--encoder", str(encoder_folder)]
    verify.main([str(copied), *again])
    assert "30 utterances encoded again" in capsys.readouterr().out
    for harmed, said in (("{}", "is no round of requeue"), ("{", "its requeue files cannot be followed")):
        (copied / "requeue-0001.json").write_text(harmed)
        with pytest.raises(UserError, match=said):
            verify.main([str(copied), *again])


QUARANTINE_DAMAGE: dict[str, tuple[Callable[[list[dict[str, Any]]], object], str]] = {
    "attempts of the last round alone": (lambda rows: rows[0].update(attempts=1), "attempts is 1, not 2"),
    "another reason": (lambda rows: rows[0].update(reason="silent"), "reason is 'silent', not 'missing_audio'"),
    "a mended one still listed": (
        lambda rows: rows.append({**rows[0], "id": "utt-003"}), "1 ids are both committed and quarantined: 'utt-003'"),
    "one twice": (lambda rows: rows.append(rows[0]), "an id is in it twice"),
    "one away": (lambda rows: rows.clear(), "in the parts' quarantine, not in both: 'utt-011'"),
}  # fmt: skip


@pytest.mark.parametrize("damage", QUARANTINE_DAMAGE)
def test_the_quarantine_is_what_the_parts_say_together(
    requeued: tuple[Path, Path], tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "set"
    shutil.copytree(requeued[0], root)
    harm, wanted = QUARANTINE_DAMAGE[damage]
    table = pq.read_table(root / shards.QUARANTINE)
    rows = table.to_pylist()
    harm(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), root / shards.QUARANTINE)
    builders.recommit(root / shards.QUARANTINE)
    assert wanted in "\n".join(says(capsys, root))


def test_a_manifest_at_an_address(
    shard_set: Path, manifest: Path, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with storage.s3_server(monkeypatch) as server:
        storage.upload(server, manifest.parent, "bucket/corpus")
        at = f"s3://bucket/corpus/{manifest.name}"
        verify.main([str(shard_set), "--manifest", at, "--sample", "1", "--encoder", str(encoder_folder)])
        _, said, tail = capsys.readouterr().out.splitlines()
        count = said.split()[0]
        assert f"compared bit for bit: {count} are equal" in said
        assert tail == "no problem found"


def test_what_cannot_be_verified_is_refused(shard_set: Path, tmp_path: Path) -> None:
    for argv, said in (
        (["s3://bucket/set"], "folders only are verified"),
        ([str(tmp_path)], "is no shard set"),
        ([str(shard_set), "--sample", "3"], "give --manifest and --encoder"),
    ):
        with pytest.raises(UserError, match=said):
            verify.main(argv)
