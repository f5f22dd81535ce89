"""Artefacts that somebody made to do harm, and what the project answers to each.

Every case builds its artefact, uses it as a person would, and gives back the answer: the one line of a UserError, a
quarantine row, or what tools.verify says of it. ``python -m pytest -s tests/unit/test_hostile.py`` prints them all.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
from safetensors.torch import save_file

from sm_train import config, files
from sm_train.data import mds, shards
from sm_train.data.hashing import tensors_hash
from sm_train.data.manifest import read_manifest
from sm_train.data.samples import FEATS, Samples
from sm_train.data.target_set import EMBEDDING, TOKENIZER, TargetSet
from sm_train.encoding.decode import DecodeConfig
from sm_train.encoding.decoders import Decoded, DecodePool
from sm_train.errors import UserError, printable
from sm_train.models import checkpoints
from sm_train.models.embedding import embedding_module
from sm_train.models.tokenizer import read_tokenizer
from sm_train.records import Utterance
from tests import builders
from tools.inspect import open_set
from tools.inspect.__main__ import main as inspect
from tools.verify.__main__ import Progress, check_utterances
from tools.verify.targets import check_targets

MAX_DURATION_S = 5.0
SHARD = "part-0000000/shard.00000.mds"


@dataclass
class World:
    """What a case has at hand: a folder, a shard set of its own in it, checkpoints, a decoding process."""

    folder: Path
    shard_set: Path
    encoder: Path
    llm: Path
    pool: DecodePool

    @property
    def outside(self) -> Path:
        """A file beside the set that nothing may open."""
        return self.folder / "outside.bin"

    @property
    def marker(self) -> Path:
        """What code in an artefact would write, if it ran."""
        return self.folder / "ran"


class Bomb:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def decode_pool() -> DecodePool:
    """One decoding process, with the limits that precompute's have."""
    return DecodePool(DecodeConfig("/", MAX_DURATION_S, -80.0, 1, None, None), 1, 20.0)


def refused(use: Callable[[], object]) -> str:
    """The line of the UserError that a use ends in."""
    try:
        use()
    except UserError as error:
        return printable(" ".join(str(error).split()))
    raise AssertionError("it was accepted")


def verified(world: World) -> str:
    """What tools.verify says first of the set."""
    problems = check_utterances(world.shard_set, [], None, 1, Progress()).problems
    assert problems, "tools.verify found nothing"
    return str(problems[0])


def sample_of(root: Path) -> dict[str, Any]:
    """The first sample of a set, as every reader gets it."""
    with Samples(root, shards.read_table(root, "utterances.parquet"), FEATS) as samples:
        return samples[0]


def rewrite_table(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Let a set say something else of its first utterance, with hashes that fit."""
    rows = pq.read_table(root / "utterances.parquet").to_pylist()
    change(rows[0])
    pq.write_table(pa.Table.from_pylist(rows), root / "utterances.parquet")
    builders.recommit(root / "utterances.parquet")


def rewrite_done(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Let a part say something else of itself, with hashes that fit."""
    path = root / "part-0000000" / shards.DONE
    done = files.read_json(path)
    change(done)
    files.write_json(path, done)
    dataset = files.read_json(root / shards.DATASET)
    digests = {part: mds.file_digest(root / part / shards.DONE) for part in shards.parts_of(root)}
    files.write_json(root / shards.DATASET, {**dataset, "part_hashes": config.fingerprint(digests)})


def rewrite_sample(root: Path, change: Callable[[bytes], bytes]) -> None:
    """Change the first sample's bytes, not their number; every hash fits."""
    path = root / SHARD
    data = bytearray(path.read_bytes())
    begin, end = struct.unpack_from("<2I", data, 4)
    changed = change(bytes(data[begin:end]))
    assert len(changed) == end - begin
    data[begin:end] = changed
    path.write_bytes(data)
    digest = mds.digest(changed)
    rewrite_table(root, lambda row: row.update(xxh3=digest))

    def of_part(done: dict[str, Any]) -> None:
        done["rows"][0]["xxh3"] = digest
        done["files"][path.name] = mds.file_digest(path)

    rewrite_done(root, of_part)


def array_head(data: bytes) -> int:
    """Where the array of a sample begins: behind two sizes (of feats and id; columns are in order of names)."""
    return 8


# --- shards ---------------------------------------------------------------------------------------------------------


def pickled_column(w: World) -> str:
    path = w.shard_set / SHARD
    data = path.read_bytes().replace(b'"ndarray:float16"', b'"pkl"            ')
    path.write_bytes(data.replace(data[-200:], pickle.dumps(Bomb(w.marker)).ljust(200, b".")))
    verified(w)
    return refused(lambda: sample_of(w.shard_set))


def four_billion_samples(w: World) -> str:
    path = w.shard_set / SHARD
    path.write_bytes(struct.pack("<I", 2**32 - 1) + path.read_bytes()[4:])
    verified(w)
    return refused(lambda: sample_of(w.shard_set))


def huge_sparse_shard(w: World) -> str:
    path = w.shard_set / SHARD
    path.write_bytes(struct.pack("<I", 2**32 - 1))
    os.truncate(path, 1 << 36)
    try:
        return refused(lambda: sample_of(w.shard_set))
    finally:
        path.unlink()


def array_of_absurd_rank(w: World) -> str:
    rewrite_sample(w.shard_set, lambda data: data[:8] + b"\xff" + data[9:])
    verified(w)
    return refused(lambda: sample_of(w.shard_set))


def array_of_absurd_shape(w: World) -> str:
    head = bytes([2 << 2 | 3]) + struct.pack("<2Q", 2**62, 2**62)
    rewrite_sample(w.shard_set, lambda data: data[:8] + head + data[8 + len(head) :])
    verified(w)
    return refused(lambda: sample_of(w.shard_set))


def array_of_negative_shape(w: World) -> str:
    head = bytes([1 << 2 | 3]) + struct.pack("<Q", 2**64 - 1)
    rewrite_sample(w.shard_set, lambda data: data[:8] + head + data[8 + len(head) :])
    return refused(lambda: sample_of(w.shard_set))


def sizes_beyond_the_sample(w: World) -> str:
    rewrite_sample(w.shard_set, lambda data: struct.pack("<2I", 2**32 - 1, 2**32 - 1) + data[8:])
    verified(w)
    return refused(lambda: sample_of(w.shard_set))


def nan_features(w: World) -> str:
    rewrite_sample(w.shard_set, lambda data: data[:101] + struct.pack("<e", np.nan) + data[103:])
    return verified(w)


def path_in_table(column: str, value: Callable[[World], str]) -> Callable[[World], str]:
    def case(w: World) -> str:
        w.outside.write_bytes((w.shard_set / SHARD).read_bytes())
        rewrite_table(w.shard_set, lambda row: row.update({column: value(w)}))
        verified(w)
        return refused(lambda: sample_of(w.shard_set))

    return case


def link_out_of_the_set(w: World) -> str:
    (w.shard_set / SHARD).rename(w.outside)
    (w.shard_set / SHARD).symlink_to(w.outside)
    verified(w)
    return refused(lambda: sample_of(w.shard_set))


def index_names_outside(w: World) -> str:
    index = files.read_json(w.shard_set / "index.json")
    index["shards"][0]["raw_data"]["basename"] = "../outside.bin"
    files.write_json(w.shard_set / "index.json", index)
    w.outside.write_bytes(b"secret")
    open_set(str(w.shard_set), None, w.folder)
    return verified(w)


def done_names_outside(w: World) -> str:
    w.outside.write_bytes(b"secret")

    def change(done: dict[str, Any]) -> None:
        done["files"] |= {"../../outside.bin": mds.digest(b"secret"), "/etc/passwd": "0" * 16}
        done["rows"][0]["shard"] = "../../outside.bin"

    rewrite_done(w.shard_set, change)
    return verified(w)


def json_instead(name: str, text: str, use: Callable[[World], str]) -> Callable[[World], str]:
    def case(w: World) -> str:
        (w.shard_set / name).write_text(text)
        return use(w)

    return case


NESTED = "[" * 200_000


def inspected(w: World) -> str:
    """What tools.inspect says of the set."""
    return refused(lambda: inspect([str(w.shard_set)]))


def read_first_part(w: World) -> str:
    """What precompute, which reads the parts that are there, says of the first."""
    verified(w)
    return refused(lambda: shards.read_part(w.shard_set, "part-0000000"))


# --- target sets ----------------------------------------------------------------------------------------------------


def embedding_of_another_width(w: World) -> str:
    root = w.shard_set / "targets/tiny"
    path = root / EMBEDDING
    tensors = {"ids": TargetSet(w.shard_set, "tiny").rows_RD.new_zeros(3).int(), "rows": torch.zeros(3, 4)}
    save_file(tensors, path)
    dataset = files.read_json(root / shards.DATASET)
    files.write_json(root / shards.DATASET, {**dataset, "embedding_hash": tensors_hash(tensors)})
    _ = str(check_targets(w.shard_set, "tiny", [], 1, Progress().advance).problems[0])
    return refused(lambda: TargetSet(w.shard_set, "tiny"))


def embedding_with_an_absurd_header(w: World) -> str:
    path = w.shard_set / "targets/tiny" / EMBEDDING
    path.write_bytes(struct.pack("<Q", 2**63) + path.read_bytes()[8:])
    return refused(lambda: TargetSet(w.shard_set, "tiny"))


def broken_tokenizer(w: World) -> str:
    (w.shard_set / "targets/tiny" / TOKENIZER).write_text('{"version": "1.0", "model": {"type": "Bomb"}}')
    targets = TargetSet(w.shard_set, "tiny")
    return refused(lambda: targets.text(targets.rows_of(0)))


# --- audio ----------------------------------------------------------------------------------------------------------


def decoded(w: World, path: Path | str, duration_s: float = 2.0, start_s: float = 0.0) -> str:
    """What becomes of an audio file in a decoding process."""
    utterance = Utterance("u", str(path), start_s, duration_s, "text", "", "", "train")
    found = w.pool.submit(utterance).result(timeout=60)
    assert not isinstance(found, Decoded), f"it gave {found.num_samples} samples"
    return printable(f"{found.reason}: {found.detail}")


def fifo(w: World) -> str:
    os.mkfifo(w.folder / "a.wav")
    return decoded(w, w.folder / "a.wav")


def device(w: World) -> str:
    (w.folder / "a.wav").symlink_to("/dev/zero")
    return decoded(w, w.folder / "a.wav")


def empty_file(w: World) -> str:
    (w.folder / "a.flac").touch()
    return decoded(w, w.folder / "a.flac")


def wav(rate_hz: int = 16_000, channels: int = 1, data: bytes = bytes(64_000), claimed: int | None = None) -> bytes:
    """A WAV of 16-bit samples whose header says what it is told to."""
    size = len(data) if claimed is None else claimed
    fields = (1, channels, rate_hz, min(rate_hz * channels * 2, 2**32 - 1), min(channels * 2, 65_535), 16)
    body = b"WAVEfmt " + struct.pack("<IHHIIHH", 16, *fields) + b"data" + struct.pack("<I", size) + data
    return b"RIFF" + struct.pack("<I", min(len(body) + size, 2**32 - 1)) + body


def wav_case(duration_s: float = 2.0, **claims: Any) -> Callable[[World], str]:
    def case(w: World) -> str:
        (w.folder / "a.wav").write_bytes(wav(**claims))
        return decoded(w, w.folder / "a.wav", duration_s)

    return case


def sparse_wav(w: World) -> str:
    (w.folder / "a.wav").write_bytes(wav(rate_hz=2**31 - 1, claimed=2**32 - 100))
    os.truncate(w.folder / "a.wav", 2**32)
    try:
        return decoded(w, w.folder / "a.wav", 4.0)
    finally:
        (w.folder / "a.wav").unlink()


def rf64_of_a_terabyte(w: World) -> str:
    soundfile.write(w.folder / "a.wav", np.zeros(1000), 16_000, format="RF64")
    data = bytearray((w.folder / "a.wav").read_bytes())
    begin = data.index(b"ds64") + 8
    data[begin : begin + 24] = struct.pack("<3Q", 2**41, 2**41, 2**40)
    (w.folder / "a.wav").write_bytes(data)
    return decoded(w, w.folder / "a.wav", 4.0)


def flac_bomb(w: World) -> str:
    """A megabyte that would be hours: no more is decoded than the manifest says, and that has a limit."""
    with soundfile.SoundFile(w.folder / "a.flac", "w", 16_000, 1, "PCM_16") as file:
        for _ in range(60):
            file.write(np.zeros(16_000 * 60, np.int16))
    assert (w.folder / "a.flac").stat().st_size < 1 << 20
    whole = decoded(w, w.folder / "a.flac", 3600.0)
    return f"{decoded(w, w.folder / 'a.flac', MAX_DURATION_S, start_s=1800.0)}; as a whole {whole}"


def flac_of_a_year(w: World) -> str:
    soundfile.write(w.folder / "a.flac", 0.1 * np.random.default_rng(0).normal(size=16_000), 16_000)
    data = bytearray((w.folder / "a.flac").read_bytes())
    data[21] |= 0x0F
    data[22:26] = b"\xff" * 4  # 2 ** 36 - 1 samples
    (w.folder / "a.flac").write_bytes(data)
    return decoded(w, w.folder / "a.flac", 4.0)


def headerless(w: World) -> str:
    (w.folder / "a.raw").write_bytes(bytes(1000))
    return decoded(w, w.folder / "a.raw")


# --- manifests ------------------------------------------------------------------------------------------------------

ROW = builders.row("u0", "a.wav", 1.0, "text")


def jsonl(data: bytes | dict[str, Any]) -> Callable[[World], str]:
    def case(w: World) -> str:
        path = w.folder / "m.jsonl"
        path.write_bytes(json.dumps(data).encode() + b"\n" if isinstance(data, dict) else data)
        return refused(lambda: read_manifest(path))

    return case


def hundred_megabytes_in_a_line(w: World) -> str:
    path = w.folder / "m.jsonl"
    with path.open("wb") as file:
        file.write(b'{"id": "')
        for _ in range(100):
            file.write(b"a" * (1 << 20))
    return refused(lambda: read_manifest(path))


def parquet_of(**columns: Any) -> Callable[[World], str]:
    def case(w: World) -> str:
        path = w.folder / "m.parquet"
        pq.write_table(pa.table({**{name: [value] for name, value in ROW.items()}, **columns}), path)
        return refused(lambda: read_manifest(path))

    return case


def gzip_bomb(w: World) -> str:
    path = w.folder / "m.parquet"
    with gzip.open(path, "wb") as file:
        for _ in range(64):
            file.write(bytes(1 << 20))
    return refused(lambda: read_manifest(path))


def parquet_bomb(w: World) -> str:
    """Millions of equal rows in a file of some kilobytes."""
    path, count = w.folder / "m.parquet", 1 << 20
    table = pa.table({name: pa.repeat(pa.scalar(value), count) for name, value in ROW.items()})
    with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
        for _ in range(6):
            writer.write_table(table, row_group_size=count)
    assert path.stat().st_size < 1 << 20
    return refused(lambda: read_manifest(path))


# --- checkpoints ----------------------------------------------------------------------------------------------------


def pickled_checkpoint(w: World) -> str:
    (w.llm / "model.safetensors").unlink()
    (w.llm / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(w.marker)))
    return refused(lambda: embedding_module(w.llm))


def checkpoint_with_an_absurd_header(w: World) -> str:
    (w.llm / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    return refused(lambda: embedding_module(w.llm))


def checkpoint_index(index: object) -> Callable[[World], str]:
    def case(w: World) -> str:
        w.outside.write_bytes((w.llm / "model.safetensors").read_bytes())
        (w.llm / "model.safetensors.index.json").write_text(json.dumps(index))
        return refused(lambda: checkpoints.weight_map(w.llm))

    return case


def config_of_wrong_types(w: World) -> str:
    settings = {"model_type": "llama", "hidden_size": "wide", "num_attention_heads": [], "rope_scaling": 3}
    (w.llm / "config.json").write_text(json.dumps(settings))
    return refused(lambda: embedding_module(w.llm))


def remote_code(w: World) -> str:
    (w.llm / "evil.py").write_text(f"open({str(w.marker)!r}, 'w')\nclass Evil: pass\n")
    settings = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (w.llm / "config.json").write_text(json.dumps({**settings, "trust_remote_code": True}))
    return refused(lambda: embedding_module(w.llm))


def tokenizer_with_code(w: World) -> str:
    (w.llm / "evil.py").write_text(f"open({str(w.marker)!r}, 'w')\nclass Evil: pass\n")
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (w.llm / "tokenizer_config.json").write_text(json.dumps({**settings, "trust_remote_code": True}))
    (w.llm / "tokenizer.json").unlink()
    return refused(lambda: read_tokenizer(w.llm))


def llm_tokenizer_broken(w: World) -> str:
    (w.llm / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Bomb"}}')
    return refused(lambda: read_tokenizer(w.llm))


CASES: dict[str, tuple[Callable[[World], str], str]] = {
    "shard with a pickled column": (pickled_column, r"'pkl'; only str and ndarray are read"),
    "shard of 2^32 - 1 samples": (four_billion_samples, r"table of offsets is cut short"),
    "sparse shard of 64 GiB": (huge_sparse_shard, r"not a whole MDS shard"),
    "array of 63 dimensions": (array_of_absurd_rank, r"utterance 'utt-000'"),
    "array of 2^62 x 2^62": (array_of_absurd_shape, r"utterance 'utt-000'"),
    "array of shape -1": (array_of_negative_shape, r"utterance 'utt-000'"),
    "columns longer than their sample": (sizes_beyond_the_sample, r"utterance 'utt-000'"),
    "NaN among features": (nan_features, r"'utt-000': a feature is NaN or infinite"),
    "table: part is ../..": (path_in_table("part", lambda w: "../"), r"leaves the set's folder"),
    "table: part is an absolute path": (path_in_table("part", lambda w: str(w.folder)), r"leaves the set's folder"),
    "table: shard of NULs": (path_in_table("shard", lambda w: "a\0b"), r"null"),
    "shard linked to a file outside": (link_out_of_the_set, r"leaves the set's folder"),
    "index.json names a file outside": (index_names_outside, r"index.json: it names a shard that no part has"),
    "_DONE.json names files outside": (done_names_outside, r"nothing outside the part is read"),
    "_DONE.json nested 200,000 deep": (
        json_instead(f"part-0000000/{shards.DONE}", NESTED, read_first_part), r"_DONE.json is not JSON"),
    "_DONE.json is a list": (
        json_instead(f"part-0000000/{shards.DONE}", "[1]", read_first_part), r"_DONE.json holds no JSON object"),
    "_DONE.json without rows": (
        json_instead(f"part-0000000/{shards.DONE}", '{"rows": {"a": 1}}', read_first_part), r"is no part's record"),
    "dataset.json nested 200,000 deep": (json_instead("dataset.json", NESTED, inspected), r"dataset.json is not JSON"),
    "dataset.json is a number": (json_instead("dataset.json", "17", inspected), r"holds no JSON object"),
    "dataset.json with a number of 10,000 digits": (
        json_instead("dataset.json", '{"a": ' + "9" * 10_000 + "}", inspected), r"dataset.json is not JSON"),
    "dataset.json with hashes that are none": (
        json_instead("dataset.json", '{"table_hashes": 1e999}', inspected), r"not the table that was committed"),
    "targets: embedding of another width": (embedding_of_another_width, r"embedding.safetensors .*width"),
    "targets: embedding with a header of 2^63 bytes": (embedding_with_an_absurd_header, r"not what was committed"),
    "targets: broken tokenizer.json": (broken_tokenizer, r"cannot be read as a tokenizer"),
    "audio: FIFO": (fifo, r"missing_audio: .*no file"),
    "audio: link to /dev/zero": (device, r"missing_audio: .*no file"),
    "audio: a folder": (lambda w: decoded(w, w.folder), r"missing_audio: .*no file"),
    "audio: no bytes": (empty_file, r"undecodable"),
    "audio: a name of 5,000 letters": (lambda w: decoded(w, w.folder / ("a" * 5000)), r"missing_audio"),
    "audio: a name with NUL": (lambda w: decoded(w, f"{w.folder}/a\0b"), r"missing_audio"),
    "audio: headerless .raw": (headerless, r"undecodable"),
    "audio: WAV that claims 2^31 bytes": (wav_case(claimed=2**31, duration_s=4.0), r"truncated"),
    "audio: RF64 that claims 2^40 samples": (rf64_of_a_terabyte, r"truncated|undecodable"),
    "audio: FLAC that claims 2^36 samples": (flac_of_a_year, r"truncated|undecodable"),
    "audio: FLAC of an hour in 1 MB": (flac_bomb, r"silent.*too_long"),
    "audio: 255 channels of silence": (wav_case(channels=255, duration_s=0.004), r"silent"),
    "audio: 65,535 channels": (wav_case(channels=65_535, duration_s=0.1), r"undecodable|truncated"),
    "audio: a rate of 0": (wav_case(rate_hz=0), r"undecodable|empty_audio"),
    "audio: a rate of 1": (wav_case(rate_hz=1), r"undecodable|silent"),
    "audio: sparse WAV of 4 GiB at a rate of 2^31 - 1": (sparse_wav, r"too_large"),
    "audio: a rate of 2^31 - 1": (wav_case(rate_hz=2**31 - 1, duration_s=4.0), r"truncated|undecodable|too_large"),
    "manifest: a line of 100 MB": (hundred_megabytes_in_a_line, r"line 1: longer than"),
    "manifest: nested 200,000 deep": (jsonl(b'{"id": ' + NESTED.encode()), r"line 1: not JSON"),
    "manifest: a number of 10,000 digits": (jsonl(b'{"id": ' + b"9" * 10_000 + b"}"), r"line 1: not JSON"),
    "manifest: duration NaN": (jsonl({**ROW, "duration_s": float("nan")}), r"duration_s is nan"),
    "manifest: duration 1e308": (jsonl({**ROW, "duration_s": 1e308}), r"duration_s is 1e\+308"),
    "manifest: duration -1": (jsonl({**ROW, "duration_s": -1}), r"duration_s is -1"),
    "manifest: start 1e308": (jsonl({**ROW, "start_s": 1e308}), r"start_s is 1e\+308"),
    "manifest: id with a newline": (jsonl({**ROW, "id": "a\nb"}), r"row 1.*control character"),
    "manifest: id with NUL": (jsonl({**ROW, "id": "a\0b"}), r"row 1.*control character"),
    "manifest: id of 1 MB": (jsonl({**ROW, "id": "a" * 10**6}), r"row 1.*1000000 characters"),
    "manifest: text with half a surrogate": (jsonl({**ROW, "text": "\ud800"}), r"row 1 \(id 'u0'\)"),
    "manifest: text is a list": (jsonl({**ROW, "text": ["a"]}), r"text is .*list"),
    "manifest: Parquet text of bytes": (parquet_of(text=[b"\xff\xfe"]), r"text is .*bytes"),
    "manifest: Parquet duration of structs": (parquet_of(duration_s=[{"a": 1}]), r"row 1 \(id 'u0'\).*dict"),
    "manifest: gzip bomb named .parquet": (gzip_bomb, r"cannot be read as Parquet"),
    "manifest: Parquet of 6 million equal rows": (parquet_bomb, r"'u0' stands in row 1 and in row 2"),
    "checkpoint: pytorch_model.bin alone": (pickled_checkpoint, r"only safetensors weights are read"),
    "checkpoint: safetensors with a header of 2^62 bytes": (
        checkpoint_with_an_absurd_header, r"model.safetensors cannot be read"),
    "checkpoint: index names a file outside": (
        checkpoint_index({"weight_map": {"a": "../outside.bin"}}), r"'../outside.bin', which is not in the folder"),
    "checkpoint: index of another form": (checkpoint_index({"weight_map": [1]}), r"index.json .*weight_map"),
    "checkpoint: config.json of wrong types": (config_of_wrong_types, r"its config.json cannot be used"),
    "checkpoint: config.json with auto_map": (remote_code, r"its config.json cannot be used"),
    "checkpoint: tokenizer with auto_map": (tokenizer_with_code, r"its tokenizer cannot be loaded"),
    "checkpoint: broken tokenizer.json": (llm_tokenizer_broken, r"its tokenizer cannot be loaded"),
}  # fmt: skip
