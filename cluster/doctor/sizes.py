"""The bytes that a stage will write, against the free disk; and object stores that it reads or writes."""

from __future__ import annotations

import os
import resource
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from cluster.doctor.findings import FAIL, OK, SKIP, WARN, Check, Finding
from cluster.doctor.machine import NETWORKS, kind_of, nearest
from cluster.doctor.work import Work
from cluster.fit import hub
from cluster.fit.shapes import llm_of, mapper_of
from sm_train import files
from sm_train.data import shards, store
from sm_train.data.mirror import GB
from sm_train.errors import UserError
from sm_train.models.speech import ENCODER_FRAME_RATE_HZ
from sm_train.train import checkpoint

_STATE = 12
"""Bytes of a trained number in a checkpoint: weight and two moments in fp32."""
_OVERHEAD = 1.01
"""Of MDS's index, tables and markers, over the features."""
_SMALL = 200 * 10**6
"""Logs, tables, a report."""
_WIDTHS = ("hidden_size", "d_model", "output_hidden_size")


def checks(work: Work) -> list[Check]:
    """Disk and storage of a stage."""
    found = [Check("disk", lambda: disk(work), 30.0)]
    cache = getattr(getattr(work.cfg, "loader", None), "cache", None)
    if cache:
        found.append(Check("cache", lambda: cache_folder(Path(cache), work.cfg.loader.cache_limit_gb)))
    if to := _staged(work):
        found.append(Check("stage_to", lambda: stage_folder(Path(to), work)))
    for uri in [work.out, *work.shard_sets, getattr(work.cfg, "manifest", "")]:
        if "://" in uri:
            look = _reader(work, uri)
            found.append(Check("storage", look, 45.0))
    return found


def _reader(work: Work, uri: str) -> Callable[[], Finding]:
    if uri == work.out:
        return lambda: writable(uri)
    if uri in work.shard_sets:
        return lambda: readable(uri, work.cfg.target)
    return lambda: Finding(OK, "storage", f"{uri} answers, {len(work.utterances)} utterances")


def disk(work: Work) -> Finding:
    """Bytes to write against what is free where they go."""
    folder = work.out_folder
    if folder is None:
        return Finding(SKIP, "disk", f"{work.out} is an object store")
    try:
        size, largest, why = to_write(work)
    except UserError as error:
        return Finding(WARN, "disk", f"what will be written is not known: {error}", "see the findings above")
    if size and (limit := resource.getrlimit(resource.RLIMIT_FSIZE)[0]) != resource.RLIM_INFINITY and limit < largest:
        text = f"files may be up to {limit:,} bytes, and one of {largest / GB:.2g} GB will be written"
        return Finding(FAIL, "disk", text, "ulimit -f unlimited, before the command")
    there = nearest(folder)
    return room(size, shutil.disk_usage(there).free, f"to {folder} ({why})")


def room(size: float, free: float, what: str) -> Finding:
    """Bytes to write against bytes that are free."""
    text = f"{size / GB:.2f} GB {what}, {free / GB:.1f} GB free"
    if size > free:
        return Finding(FAIL, "disk", text, "give another folder, free some, or write less (loop.keep, encoder.pool)")
    if size > 0.8 * free:
        return Finding(WARN, "disk", text, "it will be nearly full")
    return Finding(OK, "disk", text)


def to_write(work: Work) -> tuple[float, float, str]:
    """Bytes that a stage will still write, of these in the largest file, and what they are.

    Raises:
        UserError: they cannot be known.
    """
    if work.stage == "evaluate":
        return _SMALL, _SMALL, "answers and a report, at most"
    if work.stage == "precompute":
        return _features(work)
    mapper, unknown = mapper_of(work.cfg)
    if unknown:
        raise UserError(f"checkpoints are as large as the mapper, and there is {unknown}")
    copies = work.cfg.loop.keep + 2  # the best, and one that is being written
    state = _STATE * mapper.parameters
    why = f"{copies} checkpoints of {state / GB:.2f} GB: loop.keep {work.cfg.loop.keep}, the best, one unfinished"
    folder = work.out_folder
    there = len(list(folder.glob(f"checkpoints/step-*/{checkpoint.STATE}"))) if folder else 0
    if there:
        why += f"; {there} there already"
    return max(copies - there, 1) * state + _SMALL, 8 * mapper.parameters, why


def _features(work: Work) -> tuple[float, float, str]:
    """Features are [T, E] in fp16: seconds x frames a second x width x 2 bytes."""
    cfg, place = work.cfg, store.at(work.out)
    if shards.is_complete(place):
        return 0.0, 0.0, "the set is complete"
    folder = hub.folder_of(cfg.encoder.path, cfg.encoder.revision)
    settings = files.read_object(folder / "config.json") if folder else {}
    width = next((settings[name] for name in _WIDTHS if isinstance(settings.get(name), int)), None)
    if width is None:
        raise UserError(f"the width of encoder {cfg.encoder.path} is in no config.json here")
    seconds = [u.duration_s for u in work.utterances if u.duration_s <= cfg.max_duration_s]
    rate_hz = ENCODER_FRAME_RATE_HZ / cfg.encoder.pool
    units = -(-len(work.utterances) // cfg.unit_utterances)
    left = 1 - len(shards.committed(place, [f"part-{i:07d}" for i in range(units)])) / units
    size = _OVERHEAD * 2.0 * width * rate_hz * sum(seconds) * left
    why = f"{sum(seconds) / 3600:.1f} h x {rate_hz:g} Hz x {width} x 2 bytes" + (
        f", {left:.0%} left" if left < 1 else ""
    )
    return size, min(size, 1 << 26), why


def cache_folder(folder: Path, limit_gb: float) -> Iterator[Finding]:
    """The cache of remote sets: room for its limit, on a disk of the node."""
    there = nearest(folder)
    free, kind, held = shutil.disk_usage(there).free, kind_of(there), _held(folder)
    text = f"{folder} ({kind}): up to {limit_gb:g} GB, {held / GB:.1f} GB of it there, {free / GB:.1f} GB free"
    if free < limit_gb * GB - held:
        most = max(int(0.9 * (free + held) / GB), 1)
        yield Finding(FAIL, "cache", text, f"set loader.cache_limit_gb={most}, or another folder")
    elif kind in NETWORKS:
        yield Finding(WARN, "cache", f"{text}; every node reads it over the network", "give a folder on a local disk")
    else:
        yield Finding(OK, "cache", text)


def _held(folder: Path) -> int:
    """Bytes in a folder; another process may be adding and removing files."""
    size = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                size += os.lstat(os.path.join(path, name)).st_size
    return size


def _staged(work: Work) -> str | None:
    """Where the LLM is copied to before it is loaded, if it is."""
    section = getattr(work.cfg, "llm", None) if work.stage == "evaluate" else work.cfg
    return getattr(section, "stage_to" if work.stage == "evaluate" else "llm_stage_to", None)


def stage_folder(folder: Path, work: Work) -> Finding:
    """Room for the copy of an LLM on this node's disk."""
    path, revision = (work.cfg.llm.path, work.cfg.llm.revision) if work.stage == "evaluate" else llm_of(work.cfg)
    source, there = hub.folder_of(path, revision), nearest(folder)
    if source is None:
        return Finding(SKIP, "stage_to", f"LLM {path} is not here, so its size is not known")
    size, free = sum(file.stat().st_size for file in source.glob("*.safetensors")), shutil.disk_usage(there).free
    text = f"{folder} ({kind_of(there)}): {size / GB:.1f} GB of {path}, {free / GB:.1f} GB free"
    if size > free:
        return Finding(FAIL, "stage_to", text, "give a larger disk, or leave stage_to out")
    if kind_of(there) in NETWORKS:
        return Finding(WARN, "stage_to", f"{text}; that is no disk of this node", "give a folder on a local disk")
    return Finding(OK, "stage_to", text)


def readable(uri: str, target: str) -> Finding:
    """Whether a remote shard set and its target set answer."""
    place = store.at(uri)
    for name in (shards.DATASET, f"targets/{target}/{shards.DATASET}"):
        if not place.exists(name):
            have = ", ".join(place.names("targets")) or "none"
            text = f"{uri} answers, but {name} is not there (target sets: {have})"
            return Finding(FAIL, "storage", text, "finish its precompute or retarget, or mend shards and target")
    return Finding(OK, "storage", f"{uri} answers; the set and target {target} are complete")


def writable(uri: str) -> Finding:
    """Whether an output's storage lists, takes, gives back and deletes a small object."""
    place, name = store.at(uri), f".doctor-{socket.gethostname()}-{os.getpid()}"
    listed = place.names()
    place.write(name, b"probe")
    try:
        if place.read(name) != b"probe":
            return Finding(FAIL, "storage", f"{uri} gives back other bytes than were put", "do not use this storage")
    finally:
        place.remove(name)
    if place.exists(name):
        return Finding(FAIL, "storage", f"{uri} does not delete", "give credentials that may delete there")
    return Finding(OK, "storage", f"{uri} lists ({len(listed)} names), puts, reads and deletes")
