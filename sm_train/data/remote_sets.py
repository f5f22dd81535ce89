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
from sm_train.data.store import Place, Store
from sm_train.errors import UserError

_STREAMS = 8
_OF_ROOT = (shards.CONTRACT, shards.DATASET, shards.QUARANTINE, "index.json", "utterances.parquet")

T = TypeVar("T")


def with_local_copy(place: Place, target: str, build: Callable[[Path], T]) -> T:
    """What ``build(folder)`` returns, which reads a complete set's tables and writes a target set of it.

    The folder is the set itself where it is one. For a remote set it holds copies of its tables and of all that there
    is of the target set, unfinished too, and what ``build`` changes of that is changed there in the same order: a
    run that is killed leaves what one in a folder leaves, and the next goes on with it. Features are not fetched.

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
        wanted = {name: stat.size for name, stat in (remote.stat(_OF_ROOT) | remote.list(base)).items()}

        def fetch(name: str) -> None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            remote.download(name, folder / name, wanted[name])

        with ThreadPoolExecutor(_STREAMS) as pool:
            list(pool.map(fetch, wanted))
        before = _digests(folder, base)
        try:
            done = build(folder)
        except UserError as error:
            raise UserError(str(error).replace(str(folder), to.uri)) from None
        _upload(to, folder, base, before, _digests(folder, base))
        return done


def _upload(to: Store, folder: Path, base: str, before: dict[str, str], after: dict[str, str]) -> None:
    """Make the same changes there; what makes something whole goes first, and comes last."""
    markers = [{base + shards.DATASET}, {name for name in before | after if name.endswith(f"/{shards.DONE}")}]
    changed = {name for name in after if after[name] != before.get(name)}
    stale = {name for name in before if name not in after or (name in changed and any(name in of for of in markers))}
    with ThreadPoolExecutor(_STREAMS) as pool:
        for some in (*markers, stale.difference(*markers)):
            list(pool.map(to.remove, sorted(some & stale)))
        contract = {base + shards.CONTRACT}
        for some in (contract, changed.difference(contract, *markers), *reversed(markers)):
            list(pool.map(lambda name: to.write(name, folder / name), sorted(some & changed)))


def _digests(folder: Path, base: str) -> dict[str, str]:
    """The hashes of a target set's files, by name."""
    paths = [path for path in (folder / base).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in paths}
