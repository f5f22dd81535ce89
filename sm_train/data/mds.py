"""MDS, MosaicML's shard format, read by one small reader that needs no library; mds_writer.py writes it.

A shard file is ``u32 num_samples | u32 offsets[num_samples + 1] | JSON of the columns | samples``; a sample is
``u32 size of each variable column | bytes of each column``, columns in the order of their names
(mosaicml-streaming 0.13, ``streaming/base/format/mds``).
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

_SHAPE_BYTES = {0: 1, 1: 2, 2: 4, 3: 8}
_ARRAY_TYPES = ("float16", "float32", "int32", "uint16")


@dataclass(frozen=True, slots=True)
class SampleRef:
    """Where a sample lies inside its folder, and the xxh3 of its bytes."""

    shard: str
    index: int
    xxh3: str


def digest(data: bytes | memoryview) -> str:
    """The 64-bit xxh3 of some bytes, in 16 hexadecimal digits."""
    return str(xxhash.xxh3_64_hexdigest(data))


def file_digest(path: Path) -> str:
    """The xxh3 of a whole file."""
    hasher = xxhash.xxh3_64()
    block = bytearray(1 << 22)  # one for all, as fresh ones would cost more than the hash
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            hasher.update(memoryview(block)[:count])
    return str(hasher.hexdigest())


class Shard:
    """One open MDS file: random access by ``pread``, no decoding of anything that could run code.

    Args:
        columns: what the file must hold, by name; None for whatever it says.
        handle: an open file descriptor of it, which this object then owns; None to open ``path``.

    Raises:
        ValueError: the file is shorter than its own table says, its columns are not the expected ones, or it holds a
            column type other than str and ndarray.
    """

    def __init__(self, path: Path, columns: Mapping[str, str] | None = None, handle: int | None = None) -> None:
        self.path = path
        self._handle = os.open(path, os.O_RDONLY) if handle is None else handle
        try:
            self._read_table(columns)
        except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self.close()
            raise ValueError(f"{path} is not a whole MDS shard: {error}") from None
        except BaseException:
            self.close()
            raise

    def _read_table(self, expected: Mapping[str, str] | None) -> None:
        (self.num_samples,) = struct.unpack("<I", os.pread(self._handle, 4, 0))
        size, begin = os.fstat(self._handle).st_size, 4 * (self.num_samples + 2)
        if begin > size or size >= 1 << 32:  # what its offsets cannot reach is not even looked at
            raise ValueError("its table of offsets is cut short, or the file is longer than any")
        self.offsets: NDArray[np.uint32] = np.frombuffer(os.pread(self._handle, begin - 4, 4), "<u4")
        if self.offsets[-1] != size or self.offsets[0] < begin or (self.offsets[1:] < self.offsets[:-1]).any():
            raise ValueError(f"its table of offsets does not fit its {size} bytes")
        columns = json.loads(os.pread(self._handle, int(self.offsets[0]) - begin, begin))
        self._columns = list(zip(columns["column_names"], columns["column_encodings"], strict=True))
        for name, encoding in self._columns:
            kind, _, dtype = encoding.partition(":")
            if not (encoding == "str" or (kind == "ndarray" and dtype in _ARRAY_TYPES)):
                raise ValueError(f"column {name!r} has the type {encoding!r}; only str and ndarray are read")
        if expected is not None and self._columns != sorted(expected.items()):
            raise ValueError(f"its columns are {dict(self._columns)}, expected were {dict(expected)}")

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < self.num_samples:
            raise ValueError(f"it has {self.num_samples} samples, and none at {index}")
        return int(self.offsets[index]), int(self.offsets[index + 1])

    def read(self, index: int) -> bytes:
        """The raw bytes of one sample."""
        begin, end = self._place(index)
        return os.pread(self._handle, end - begin, begin)

    def read_into(self, index: int, column: str, out: NDArray[Any]) -> str:
        """Read one sample with the array of a column put straight into ``out``, which is contiguous.

        Returns:
            The digest of all bytes of the sample; unless it is the expected one, ``out`` holds nothing of use.

        Raises:
            ValueError: the column's array has not the type and shape of ``out``, or the file is cut short.
        """
        begin, end = self._place(index)
        words = os.pread(self._handle, 4 * len(self._columns), begin)
        if len(words) != 4 * len(self._columns):
            raise ValueError(f"it is cut short at sample {index}")
        sizes = struct.unpack(f"<{len(self._columns)}I", words)
        number = [name for name, _ in self._columns].index(column)
        wanted = array_head(out)
        head = bytearray(min(4 * len(sizes) + sum(sizes[:number]) + len(wanted), end - begin))
        tail = bytearray(max(end - begin - len(head) - out.nbytes, 0))
        done = os.preadv(self._handle, [head, out.data, tail], begin)
        hasher = xxhash.xxh3_64(head)
        hasher.update(out.data)
        hasher.update(tail)
        if (
            self._columns[number][1] != f"ndarray:{out.dtype}"
            or done != end - begin
            or sizes[number] != len(wanted) + out.nbytes
            or not head.endswith(wanted)
        ):
            raise ValueError(f"sample {index} does not hold {column!r} as {out.dtype} of shape {out.shape}")
        return str(hasher.hexdigest())

    def decode(self, data: bytes) -> dict[str, Any]:
        """Columns of a sample's bytes, which the caller has verified; arrays are read-only views.

        Raises:
            ValueError: they are no sample: they were written by something else.
        """
        if len(data) < 4 * len(self._columns):
            raise ValueError("its bytes are too few for a sample")
        sizes = struct.unpack_from(f"<{len(self._columns)}I", data)
        begin = 4 * len(self._columns)
        sample: dict[str, Any] = {}
        for (name, encoding), size in zip(self._columns, sizes, strict=True):
            value = memoryview(data)[begin : begin + size]
            sample[name] = str(value, "utf-8") if encoding == "str" else _array(value, encoding.partition(":")[2])
            begin += size
        return sample

    def close(self) -> None:
        """Give the file handle back."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _array(value: memoryview, dtype: str) -> NDArray[Any]:
    if not len(value):
        raise ValueError("an array of no bytes")
    num_dims, width = value[0] >> 2, _SHAPE_BYTES[value[0] & 3]
    end = 1 + num_dims * width
    shape = np.frombuffer(value[1:end], f"<u{width}").tolist() if len(value) > end else []
    if len(value) <= end or math.prod(shape) * np.dtype(dtype).itemsize != len(value) - end:
        raise ValueError(f"{len(value)} bytes are no array of {num_dims} dimensions, {shape[:4]} first")
    return np.frombuffer(value[end:], dtype).reshape(shape)


def array_head(array: NDArray[Any]) -> bytes:
    """What stands before the numbers of an array in a sample: its rank and its shape, in the smallest type."""
    code = next(code for code, width in _SHAPE_BYTES.items() if max(array.shape) < 1 << 8 * width)
    return bytes([array.ndim << 2 | code]) + np.array(array.shape, f"<u{_SHAPE_BYTES[code]}").tobytes()
