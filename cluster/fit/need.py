"""Will a training stage fit? The bytes of a rank on its device, and of a node's ranks in host memory, by term.

Everything follows from the config, from the LLM's config.json and from the tables of a local shard set, by the formula
of :mod:`cluster.fit.memory`; what is not known is assumed, and said.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from cluster.fit.gpus import GPUS
from cluster.fit.memory import GIB, MARGIN, Llama, Mapper, memory_terms, pretrain_terms
from cluster.fit.rows import Rows, read_rows
from cluster.fit.shapes import TrainingConfig, largest_table, llm_of, mapper_of, read_shape, sets_of
from sm_train.errors import UserError
from sm_train.pretrain import PretrainConfig
from sm_train.tune import TuneConfig

PROCESS_BYTES = 0.5 * GIB
"""Of a rank that has imported everything and holds nothing: 455 MiB were measured."""
_STATE = 12.0
"""Bytes of a trained number in fp32: weight and two moments, as a run begins with it and as it is saved."""
OF_THE_TURN = ("llm_kept", "mapper_kept", "loss_kept", "logits", "gathered")
"""What is there only while a micro-batch is at work."""
_FILE_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True, slots=True)
class Ranks:
    """How many, and where."""

    count: int = 1
    per_node: int = 1
    on_cpu: bool = False


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that a stage needs, by term."""

    device: dict[str, float]
    """One rank's, on its device: its share of host memory where that is a CPU."""
    host: dict[str, float]
    """One node's, beside the devices."""
    assumed: tuple[str, ...]

    @property
    def is_known(self) -> bool:
        return bool(self.device)

    @property
    def device_bytes(self) -> float:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> float:
        return sum(self.host.values())


def gpu_bytes(name: str) -> float:
    """The memory of a GPU by its name, as torch reports it.

    Raises:
        UserError: no such GPU is known.
    """
    found = {gpu.name: gpu.memory_gib * GIB for gpu in GPUS}
    if name not in found:
        raise UserError(f"GPU {name!r} is not known; name one of {', '.join(found)}")
    return found[name]


@dataclass(frozen=True, slots=True)
class _Known:
    """What is read once, whatever the settings that are tried."""

    mapper: Mapper
    llm: Llama | None
    dtype: str
    """Of the LLM's files."""
    rows: Rows
    table: tuple[int, int] | None
    assumed: tuple[str, ...]


def _read(cfg: TrainingConfig) -> _Known:
    """Raises UserError: the LLM's shape is not known."""
    llm, dtype = read_shape(*llm_of(cfg)) if isinstance(cfg, TuneConfig) else (None, "")
    mapper, without = mapper_of(cfg, llm.width if llm else None)
    rows, unlike = read_rows(sets_of(cfg), cfg.target, cfg.splits)
    return _Known(mapper, llm, dtype, rows, largest_table(cfg), tuple(filter(None, (without, unlike))))


def need(cfg: TrainingConfig, ranks: Ranks) -> Need:
    """What a stage needs; where that cannot be known, no terms and the reason."""
    try:
        return _need(cfg, ranks, _read(cfg))
    except UserError as error:
        return Need({}, {}, (str(error),))


def _need(cfg: TrainingConfig, ranks: Ranks, known: _Known) -> Need:
    engine, mapper = cfg.engine, known.mapper
    stage = engine.zero_stage if engine.name == "deepspeed" else 0
    if isinstance(cfg, TuneConfig) and known.llm:
        batch = known.rows.batch(cfg.batch.samples, cfg.batch.tokens, engine.split)
        terms = memory_terms(
            known.llm, mapper, batch, cfg.placement, ranks.count, engine.precision,
            recomputed=cfg.checkpoint_activations, on_cpu=ranks.on_cpu, zero_stage=stage,
        )  # fmt: skip
    elif isinstance(cfg, PretrainConfig):
        frames = known.rows.piece(cfg.batch.frames, engine.split)
        terms = pretrain_terms(mapper, frames, ranks.count, engine.precision, stage, on_cpu=ranks.on_cpu)
    if known.table:
        terms["target_table"] = 4.0 * known.table[0] * known.table[1]
    if not ranks.on_cpu:
        return Need(terms, _on_host(cfg, known, ranks), known.assumed)
    terms["process"] = PROCESS_BYTES
    of_turn = sum(terms.get(name, 0.0) for name in OF_THE_TURN)
    terms["state_copy"] = max(_STATE * mapper.parameters - of_turn, 0.0)  # never at the same time
    return Need(terms, {}, known.assumed)


def _on_host(cfg: TrainingConfig, known: _Known, ranks: Ranks) -> dict[str, float]:
    """Bytes of a node beside its GPUs: what runs begin with, what rank 0 saves, and an LLM that waits or is cast."""
    state = _STATE * known.mapper.parameters
    host = {"states": ranks.per_node * (state + 4.0 * known.mapper.parameters) + state}
    host["processes"] = ranks.per_node * 2.0 * GIB
    if isinstance(cfg, TuneConfig) and known.llm:
        frozen = (4.0 if cfg.engine.precision == "fp32" else 2.0) * known.llm.parameters
        if cfg.placement == "offload":
            host["llm_waiting"] = frozen * ranks.per_node / ranks.count
        elif cfg.placement == "replicated" and known.dtype != _FILE_DTYPES[cfg.engine.precision]:
            host["llm_loading"] = frozen * ranks.per_node  # cast on the CPU; as it is in its file, it is mapped
    return host


def require_fits(
    cfg: TrainingConfig, device: str | float | None, ranks: Ranks, host_bytes: float | None = None
) -> Need:
    """What a stage needs, if that fits.

    Args:
        device: memory of a rank's device in bytes, or a GPU's name; None for ranks on CPUs, which share ``host_bytes``.
        host_bytes: a node's memory; None if it is not known, and then not judged.

    Raises:
        UserError: by the formula it does not fit. What cannot be known is not refused: the need has no terms then.
    """
    room = gpu_bytes(device) if isinstance(device, str) else device
    found = need(cfg, ranks)
    if why := lack(found, room, host_bytes, ranks):
        raise UserError(f"{why}; {_remedy(cfg, room, ranks, host_bytes)}")
    return found


def _remedy(cfg: TrainingConfig, room: float | None, ranks: Ranks, host_bytes: float | None) -> str:
    known = _read(cfg)
    for words, other, places in _remedies(cfg, ranks):
        if not lack(_need(other, places, known), room, host_bytes, places):
            return f"by the same formula it fits with {words}"
    return "no setting makes it fit; take larger devices, or a smaller LLM"


def lack(found: Need, room: float | None, host_bytes: float | None, ranks: Ranks) -> str:
    """What does not fit, its largest terms first; empty if all does."""
    if room is None and host_bytes is not None and ranks.per_node * found.device_bytes > MARGIN * host_bytes:
        return _too_large(f"{ranks.per_node} ranks", found.device, ranks.per_node, host_bytes, "host memory")
    if room is not None and found.device_bytes > MARGIN * room:
        return _too_large("a rank", found.device, 1, room, "device")
    if host_bytes is not None and found.host_bytes > MARGIN * host_bytes:
        return _too_large("a node's ranks", found.host, 1, host_bytes, "host memory")
    return ""


def _too_large(who: str, terms: dict[str, float], times: int, room: float, where: str) -> str:
    return f"{who} would need {sizes(terms, times)}, and the {where} has {room / GIB:.1f} GiB, 95% of it to fill"


def sizes(terms: dict[str, float], times: int = 1, most: int = 3) -> str:
    """The sum of some terms, and the largest of them."""
    largest = sorted(terms.items(), key=lambda term: -term[1])[:most]
    named = ", ".join(f"{name} {times * size / GIB:.1f}" for name, size in largest if times * size > 0.05 * GIB)
    return f"{times * sum(terms.values()) / GIB:.1f} GiB" + (f" ({named})" if named else "")


def _remedies(cfg: TrainingConfig, ranks: Ranks) -> Iterator[tuple[str, TrainingConfig, Ranks]]:
    """Settings that need less, the ones that cost least first, as words of a command line."""
    cut: list[tuple[str, dict[str, Any]]] = [
        (f"engine.split={n}", {"engine": replace(cfg.engine, split=n)}) for n in (2, 4, 8, 16)
    ]
    more = [replace(ranks, count=n) for n in range(ranks.count + 1, cfg.batch.lanes + 1) if cfg.batch.lanes % n == 0]
    smaller = [(key, getattr(cfg.batch, key)) for key in ("samples", "tokens", "frames") if getattr(cfg.batch, key, 0)]
    lower = [
        (f"batch.{key}={size // 2}", {"batch": replace(cfg.batch, **{key: size // 2})}) for key, size in smaller[:1]
    ]
    if isinstance(cfg, PretrainConfig):
        for word, fields in [*cut, *lower]:
            yield word, replace(cfg, **fields), ranks
        for places in more if cfg.engine.name == "deepspeed" else []:
            yield f"{places.count} ranks", cfg, places
        return
    again, recomputed = "checkpoint_activations=true", {"checkpoint_activations": True}
    activations = [("", {}), *cut, (again, recomputed), *lower]
    activations += [(f"{again} {word}", {**recomputed, **fields}) for word, fields in cut]
    for placement in dict.fromkeys((cfg.placement, "zero3", "offload")):
        where = "" if placement == cfg.placement else f"placement={placement}"
        for places in [ranks, *(more if placement != "replicated" else [])]:
            who = f"{places.count} ranks" if places is not ranks else ""
            for word, fields in activations:
                said = " ".join(filter(None, (where, word)))
                yield " on ".join(filter(None, (said, who))), replace(cfg, placement=placement, **fields), places
