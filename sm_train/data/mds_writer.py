"""MDS, written: arrays go straight into the file, hashed on the way and read back once.

Byte for byte what mosaicml-streaming 0.13's MDSWriter writes with its defaults, index included, without its copies.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from sm_train.data.mds import SampleRef, array_head

SHARD_BYTES = 1 << 26
_MOST_PIECES = 1024  # that one call of the system takes
_BLOCK_BYTES = 1 << 22

Piece = bytes | memoryview


def write(
    folder: Path, columns: Mapping[str, str], samples: Iterable[Mapping[str, Any]]
) -> tuple[list[SampleRef], dict[str, str]]:
    """Write samples as MDS shards with an ``index.json`` into a new folder, and read all of it back.

    Args:
        columns: by name ``str`` or ``ndarray:DTYPE``; arrays hold numbers and stay as they are while this runs.

    Returns:
        Where each sample lies, and the xxh3 of each file.

    Raises:
        ValueError: an array has another type than its column, or holds nothing.
        RuntimeError: what lies on disk is not what was written.
    """
    folder.mkdir(parents=True)
    layout: dict[str, Any] = {
        "column_encodings": [columns[name] for name in sorted(columns)], "column_names": sorted(columns),
        "column_sizes": [None] * len(columns), "compression": None, "format": "mds", "hashes": [],
        "size_limit": SHARD_BYTES, "version": 2,
    }  # fmt: skip
    config = json.dumps(layout, sort_keys=True).encode()
    refs: list[SampleRef] = []
    digests: dict[str, str] = {}
    entries: list[dict[str, Any]] = []

    def flush(some: list[list[Piece]]) -> None:
        name = f"shard.{len(entries):05}.mds"
        found, digests[name], size = _write_shard(folder / name, config, some)
        refs.extend(SampleRef(name, i, digest) for i, digest in enumerate(found))
        raw = {"basename": name, "bytes": size, "hashes": {}}
        entries.append({**layout, "raw_data": raw, "samples": len(some), "zip_data": None})

    pending: list[list[Piece]] = []
    begin = size = 8 + len(config)
    for sample in samples:
        pieces = _pieces(columns, sample)
        added = sum(map(len, pieces)) + 4
        if pending and size + added > SHARD_BYTES:
            flush(pending)
            pending, size = [], begin
        pending.append(pieces)
        size += added
    if pending:
        flush(pending)
    index = json.dumps({"version": 2, "shards": entries}, sort_keys=True).encode()
    (folder / "index.json").write_bytes(index)
    return refs, {**digests, "index.json": str(xxhash.xxh3_64_hexdigest(index))}


def _pieces(columns: Mapping[str, str], sample: Mapping[str, Any]) -> list[Piece]:
    """The bytes of a sample: the size of each column, then the columns in the order of their names."""
    sizes, pieces = [], []
    for name in sorted(columns):
        value, encoding = sample[name], columns[name]
        if encoding == "str":
            found: list[Piece] = [value.encode()]
        else:
            found = _array(value, encoding.partition(":")[2], name)
        sizes.append(sum(map(len, found)))
        pieces += found
    return [struct.pack(f"<{len(sizes)}I", *sizes), *pieces]


def _array(value: NDArray[Any], dtype: str, name: str) -> list[Piece]:
    if value.dtype != dtype or value.size == 0:
        raise ValueError(f"column {name!r} holds {value.dtype} of shape {value.shape}; numbers of {dtype} are wanted")
    flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    return [array_head(value), flat.data]


def _write_shard(path: Path, config: bytes, samples: Sequence[list[Piece]]) -> tuple[list[str], str, int]:
    """Write one file; returns the digests of its samples, its own, and its bytes."""
    lengths = [sum(map(len, pieces)) for pieces in samples]
    head_bytes = 4 * (len(samples) + 2) + len(config)
    offsets = np.cumsum([head_bytes, *lengths]).astype("<u4")
    head = struct.pack("<I", len(samples)) + offsets.tobytes() + config
    whole, digests = xxhash.xxh3_64(head), []
    for pieces in samples:
        hasher = xxhash.xxh3_64()
        for piece in pieces:
            hasher.update(piece)
            whole.update(piece)
        digests.append(str(hasher.hexdigest()))
    pieces = [head, *(piece for sample in samples for piece in sample)]
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        _write_all(handle, pieces)
        if _digest_of(handle) != whole.hexdigest():
            raise RuntimeError(f"{path}: what lies on disk differs from what was written")
    finally:
        os.close(handle)
    return digests, str(whole.hexdigest()), int(offsets[-1])


def _write_all(handle: int, pieces: Sequence[Piece]) -> None:
    for first in range(0, len(pieces), _MOST_PIECES):
        views = [memoryview(piece) for piece in pieces[first : first + _MOST_PIECES] if len(piece)]
        while views:
            done = os.writev(handle, views)
            while views and done >= len(views[0]):
                done -= len(views.pop(0))
            if done:
                views[0] = views[0][done:]


def _digest_of(handle: int) -> str:
    block, hasher, at = bytearray(_BLOCK_BYTES), xxhash.xxh3_64(), 0
    while count := os.preadv(handle, [block], at):
        hasher.update(memoryview(block)[:count])
        at += count
    return str(hasher.hexdigest())
