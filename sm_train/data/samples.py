"""Verified random access to the samples of a set, local or mirrored: every read is checked against its xxh3."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sm_train.data import arrival, mds
from sm_train.data.mirror import Mirror
from sm_train.errors import UserError

FEATS = {"id": "str", "feats": "ndarray:float16"}
TOKENS = {"id": "str", "tokens": "ndarray:int32"}
_OPEN_SHARDS = 128
_OPEN_MIRRORED = 1  # what a reader holds open cannot leave the cache

_mirrored: weakref.WeakSet[Samples] = weakref.WeakSet()
"""This process's readers of mirrored sets: what they hold open cannot leave the cache."""

T = TypeVar("T")


class Samples:
    """A set's samples by row of its table. Any thread may read; one reads at a time.

    Args:
        columns: what its shards hold; a shard that says otherwise is corrupt.
        mirror: fetches the shards that are not under ``root`` yet; None where all are there.
    """

    def __init__(self, root: Path, table: pa.Table, columns: Mapping[str, str], mirror: Mirror | None = None) -> None:
        self.root, self.columns, self.mirror = root, dict(columns), mirror
        self._base = root.resolve()
        arrays = [table.column(name).combine_chunks() for name in ("id", "part", "shard", "index", "xxh3")]
        self._ids, self._parts, self._shards, self._index, self._xxh3 = arrays
        self._open: dict[str, mds.Shard] = {}
        self._lock = threading.RLock()
        if mirror is not None:
            _mirrored.add(self)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """The decoded sample of one row; arrays are read-only.

        Raises:
            UserError: its bytes are not those that were committed, however often they are read and fetched; or are
                those, and no sample.
        """

        def read(shard: mds.Shard, index: int) -> tuple[str, Callable[[], dict[str, Any]]]:
            data = shard.read(index)
            return mds.digest(data), partial(shard.decode, data)

        decode = self._verified(row, read)
        try:
            return decode()
        except ValueError as error:
            place = f"{self.root / self.shard_name(row)}: utterance {self._ids[row].as_py()!r}"
            raise UserError(f"{place} was committed as what is no sample ({error}); do not use this set") from None

    def read_into(self, row: int, column: str, out: NDArray[Any]) -> None:
        """Read one row's array straight into ``out``, which is contiguous and of its type and shape.

        Raises:
            UserError: as for a whole sample; also if its array is of another type or shape.
        """
        self._verified(row, lambda shard, index: (shard.read_into(index, column, out), None))

    def shard_name(self, row: int) -> str:
        """The shard file that a row lies in, relative to the set's folder."""
        return f"{self._parts[row]}/{self._shards[row]}"

    def shard_numbers(self) -> NDArray[np.int64]:
        """The number of the shard file that each row lies in, by first appearance [rows]."""
        names = pc.binary_join_element_wise(self._parts, self._shards, "/")
        numbers: NDArray[np.int64] = names.dictionary_encode().indices.to_numpy().astype(np.int64)
        return numbers

    def _verified(self, row: int, read: Callable[[mds.Shard, int], tuple[str, T]]) -> T:
        name, index, committed = self.shard_name(row), self._index[row].as_py(), self._xxh3[row].as_py()
        reason = ""
        with self._lock:
            for attempt in range(3 if self.mirror else 2):
                if self.mirror and attempt == 2:
                    self.mirror.discard(name)
                try:
                    found, sample = read(self._shard(name), index)
                    if found == committed:
                        return sample
                    reason = f"their xxh3 is {found}, not {committed}"
                except (OSError, ValueError) as error:
                    reason = str(error)
                    if self.mirror is None and attempt == 0:
                        arrival.wait_for(self._base / name)
                self._forget(name)
        place = f"{self.mirror.uri}/{name}, fetched to {self.root}" if self.mirror else f"{self.root / name}"
        raise UserError(
            f"{place}: the bytes of utterance {self._ids[row].as_py()!r} are not those that were committed ({reason}); "
            "restore the file, or remove its part folder and dataset.json and run precompute again"
        )

    def _shard(self, name: str) -> mds.Shard:
        shard = self._open.pop(name, None)
        if shard is None:
            path = (self._base / name).resolve()
            if not path.is_relative_to(self._base):
                raise UserError(
                    f"shard set {self.root}: the path {name!r} leaves the set's folder; do not use this set"
                )
            while len(self._open) >= (_OPEN_MIRRORED if self.mirror else _OPEN_SHARDS):
                self._forget(next(iter(self._open)))
            shard = mds.Shard(path, self.columns, self.mirror.open(name, _release) if self.mirror else None)
        self._open[name] = shard  # the last one used stands last
        return shard

    def _forget(self, name: str) -> None:
        if shard := self._open.pop(name, None):
            shard.close()

    def release(self) -> None:
        """Close every open shard file, unless another thread is reading one."""
        if self._lock.acquire(blocking=False):
            try:
                self.close()
            finally:
                self._lock.release()

    def close(self) -> None:
        """Close every open shard file."""
        with self._lock:
            for name in list(self._open):
                self._forget(name)

    def __enter__(self) -> Samples:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _release() -> None:
    for samples in list(_mirrored):
        samples.release()
