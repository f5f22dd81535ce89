"""Work on a set's tables where the set may be remote: in a folder that stands for it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from sm_train.data import shards, store
from sm_train.data.mds import file_digest
from sm_train.data.remote import Remote
from sm_train.data.store import Place

_READERS = 8
_OF_ROOT = (shards.CONTRACT, shards.DATASET, shards.QUARANTINE, "index.json", "utterances.parquet")

T = TypeVar("T")


def with_local_copy(place: Place, target: str, build: Callable[[Path], T]) -> T:
    """What ``build(folder)`` returns, which reads a complete set's tables and writes a target set of it.

    The folder is the set itself where it is one. For a remote set it holds copies of its tables and of the target set,
    as far as there is one; what ``build`` has made of that is uploaded, ``dataset.json`` last, so that a run that is
    killed is simply done again. Features are not fetched.

    Args:
        target: the target set's name.

    Raises:
        UserError: the set is not complete, or the storage cannot be reached; and what ``build`` raises.
    """
    to = store.at(place)
    if "://" not in to.uri:
        return build(Path(to.uri))
    remote, base = Remote(to.uri), f"targets/{target}/"
    with tempfile.TemporaryDirectory(prefix="sm_train-set-") as name:
        folder = Path(name) / "set"
        wanted = {name: stat.size for name, stat in remote.stat(_OF_ROOT).items()}
        is_there = to.exists(base + shards.DATASET)
        if is_there:  # an unfinished one is made anew
            wanted |= {name: stat.size for name, stat in remote.list(base).items()}

        def fetch(name: str) -> None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            remote.download(name, folder / name, wanted[name])

        with ThreadPoolExecutor(_READERS) as pool:
            list(pool.map(fetch, wanted))
        before = _digests(folder, base)
        done = build(folder)
        after = _digests(folder, base)
        if before.get(base + shards.DATASET) != after.get(base + shards.DATASET):
            if is_there:
                to.remove(base + shards.DATASET)
            to.publish(folder / base, base.rstrip("/"), shards.DATASET)
        else:
            for changed in sorted(name for name in after if after[name] != before.get(name)):
                to.write(changed, (folder / changed).read_bytes())
        return done


def _digests(folder: Path, base: str) -> dict[str, str]:
    """The hashes of a target set's files, by name."""
    paths = [path for path in (folder / base).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in paths}
