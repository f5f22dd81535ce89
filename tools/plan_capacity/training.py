"""The two stages of training: steps, what they wait for, whether the LLM fits."""

from __future__ import annotations

import math

from sm_train.errors import UserError
from sm_train.train.engines import EngineConfig
from tools.plan_capacity import formulas, steps, storage
from tools.plan_capacity.hardware import (
    GIB,
    LINK_REACHED,
    MARGIN,
    PLACEMENTS,
    across,
    in_precision,
    predict,
    pretrain_terms,
    time_terms,
)
from tools.plan_capacity.rates import Rates
from tools.plan_capacity.stages import Job, StagePlan, largest, nodes, storage_bytes_s
from tools.plan_capacity.steps import Steps


def _reading_s(
    job: Job, gpus: int, step_bytes: float, num_steps: float, corpus_bytes: float
) -> tuple[float, str, float]:
    """Seconds of reading in all steps, what bounds them, and bytes that come from the storage."""
    cfg, wanted = job.cfg, step_bytes * num_steps
    outside, bound = storage_bytes_s(cfg, gpus)
    if corpus_bytes <= cfg.cache_tb * 1e12:
        fetched = min(corpus_bytes * nodes(cfg, gpus), wanted)
        near = (wanted - fetched) / (cfg.disk_gb_s * 1e9 * nodes(cfg, gpus))
        return fetched / outside + near, bound if fetched / outside > near else "disk", fetched
    return wanted / outside, bound, wanted


def _training(
    job: Job, name: str, gpus: int, num_steps: int, planned: Steps, parts: dict[str, float], start_s: float,
    validations: tuple[int, float], saves: int,
) -> StagePlan:  # fmt: skip
    """What both stages of training have in common: reading hides behind the rest, or the other way round."""
    features = storage.features(job.corpus, job.shapes)["features"]
    frames = planned.items * job.corpus.mean_s * job.shapes.frame_hz
    step_bytes = frames * job.shapes.width * formulas.FEATURE_BYTES
    reading_s, bound, fetched = _reading_s(job, gpus, step_bytes, num_steps, features)
    feed = step_bytes * num_steps / gpus / sum(parts.values())
    waiting = max(reading_s - sum(parts.values()), 0.0)
    rest = {
        f"waiting for {bound}": waiting,
        "validation": validations[0] * validations[1],
        "saving": saves * job.rates.save_s.value,
        "start": start_s,
    }
    of_steps = {**parts, **({f"waiting for {bound}": waiting} if waiting else {})}
    limit = bound if waiting else largest(of_steps)
    parts = {part: seconds for part, seconds in {**parts, **rest}.items() if seconds}
    loop = (job.shapes.pretrain if name == "pretrain" else job.shapes.tune).loop
    disk = storage.checkpoints(
        job.shapes.mapper.parameters,
        num_steps,
        loop.save_every,
        loop.validate_every if validations[0] else 0,
        loop.keep,
    )
    notes = [
        f"{num_steps:,} steps of {frames / job.shapes.frame_hz / 3600:.2f} h audio, {planned.filled / gpus:.1%} of the "
        f"padded work is real; {num_steps / planned.per_epoch:,.2f} epochs"
    ]
    return StagePlan(name, gpus, sum(parts.values()), parts, limit, disk, fetched, feed, notes)


def pretrain(job: Job) -> StagePlan:
    """Stage 1: the config's steps, or as many as so many epochs have.

    Raises:
        UserError: a micro-batch does not fit the GPU, or its precision does not.
    """
    cfg, shapes, rates, gpus = job.cfg, job.shapes, job.rates, job.cfg.gpus_of("pretrain")
    planned = steps.pretraining(job.corpus, shapes, gpus)
    room = _require_frames(job, gpus, planned)
    loop = shapes.pretrain.loop
    num_steps = math.ceil(cfg.epochs * planned.per_epoch) if cfg.epochs else loop.steps
    link = LINK_REACHED * across(job.gpu, gpus, cfg.gpus_per_node, cfg.network_gb_s).link_gb_s * 1e9
    parts = {
        "compute": num_steps * planned.padded * rates.pretrain_frame_s.value,
        "update": num_steps * rates.pretrain_step_s.value / (gpus if _is_sharded(shapes.pretrain.engine, rates) else 1),
    }
    if gpus > 1 and not rates.has_links:
        parts["all-reduce"] = num_steps * formulas.all_reduce_s(4.0 * shapes.mapper.parameters, gpus, link)
    every = loop.validate_every if shapes.pretrain.valid_splits and job.corpus.num_valid else 0
    times = -(-num_steps // every) if every else 0
    valid_s = job.corpus.valid_s / (gpus * rates.pretrain_valid_x.value)
    saves = storage.num_saves(num_steps, loop.save_every, every)
    made = _training(
        job, "pretrain", gpus, num_steps, planned, parts, rates.pretrain_start_s.value, (times, valid_s), saves
    )
    made.notes.extend(room)
    return _warn_of_tables(job, made)


def _require_precision(job: Job, stage: str, precision: str) -> None:
    if precision == "bf16" and job.gpu.precision == "fp16":
        raise UserError(
            f"{stage}: engine.precision is bf16, which {job.gpu.name} is not made for; take "
            f"{stage}.words=[engine.precision=fp16]"
        )


def _require_frames(job: Job, gpus: int, planned: Steps) -> list[str]:
    if job.cfg.gpu == "cpu":
        return []
    cfg, (items, longest) = job.shapes.pretrain, planned.largest
    _require_precision(job, "pretrain", cfg.engine.precision)
    stage = cfg.engine.zero_stage if cfg.engine.name == "deepspeed" else 0
    frames = items * longest // cfg.engine.split
    gib = sum(pretrain_terms(job.shapes.mapper, frames, gpus, cfg.engine.precision, stage).values()) / GIB
    room = f"{MARGIN * job.gpu.memory_gib:.1f} GiB of {job.gpu.name}"
    if gib > MARGIN * job.gpu.memory_gib:
        raise UserError(
            f"pretrain: a micro-batch of {items * longest:,} padded frames takes {gib:.1f} GiB on each of {gpus} GPUs, "
            f"above {room}; take pretrain.words=[engine.split={2 * cfg.engine.split}], or a smaller batch.frames"
        )
    return [f"{gib:.1f} GiB at the largest micro-batch, of {room}"]


def _is_sharded(engine: EngineConfig, rates: Rates) -> bool:
    """Whether each rank updates its own part of the weights; measured over several ranks, it is in the rate."""
    return engine.name == "deepspeed" and engine.zero_stage > 0 and not rates.has_links


def tune(job: Job) -> StagePlan:
    """Stage 2: the config's steps, by placement.

    Raises:
        UserError: the LLM does not fit the GPU with the config's placement, or its precision does not.
    """
    cfg, shapes, rates, gpus = job.cfg, job.shapes, job.rates, job.cfg.gpus_of("tune")
    planned, loop = steps.tuning(job.corpus, shapes, gpus), shapes.tune.loop
    notes = _require_room(job, gpus, planned)
    gpu = across(in_precision(job.gpu, shapes.tune.engine.precision), gpus, cfg.gpus_per_node, cfg.network_gb_s)
    one = steps.micro_batch(job.corpus, shapes, planned, largest=False)
    times = time_terms(shapes.llm, shapes.mapper, one, shapes.tune.placement, gpus, gpu)
    parts = {
        "compute": loop.steps * planned.padded * rates.tune_token_s.value,
        "update": loop.steps * rates.tune_step_s.value,
    }
    if not rates.has_links and cfg.gpu != "cpu":
        of_links = {
            "gathers": planned.micro_batches * times["gathers"],
            "host memory": planned.micro_batches * times["pcie"],
        }
        of_links["all-reduce"] = times["update"]
        parts |= {name: loop.steps * seconds for name, seconds in of_links.items() if seconds}
    every = loop.validate_every if shapes.tune.valid_splits and job.corpus.num_valid else 0
    times_valid = -(-loop.steps // every) if every else 0
    valid_s = job.corpus.num_valid * rates.tune_valid_s.value / gpus
    saves = storage.num_saves(loop.steps, loop.save_every, every)
    made = _training(
        job, "tune", gpus, loop.steps, planned, parts, rates.tune_start_s.value, (times_valid, valid_s), saves
    )
    made.notes.extend(notes)
    return made


def _require_room(job: Job, gpus: int, planned: Steps) -> list[str]:
    cfg, shapes = job.cfg, job.shapes
    if cfg.gpu == "cpu":
        return []
    _require_precision(job, "tune", shapes.tune.engine.precision)
    batch = steps.micro_batch(job.corpus, shapes, planned, largest=True)
    placement, recomputed = shapes.tune.placement, shapes.tune.checkpoint_activations
    gpu = in_precision(job.gpu, shapes.tune.engine.precision)
    found = {(p, r): predict(gpu, shapes.llm, shapes.mapper, batch, p, gpus, recomputed=r)
             for p in PLACEMENTS for r in (False, True)}  # fmt: skip
    asked = found[placement, recomputed]
    room = f"{MARGIN * job.gpu.memory_gib:.1f} GiB of {cfg.gpu}"
    if not asked.fits:
        ways = [f"tune.words=[placement={p},checkpoint_activations={str(r).lower()}]"
                for (p, r), one in found.items() if one.fits]  # fmt: skip
        remedy = (
            f"what fits: {'; '.join(ways)}" if ways else "nothing fits: take a larger GPU, or a smaller micro-batch"
        )
        raise UserError(
            f"tune: LLM {shapes.evaluate.llm.path} with a micro-batch of {batch.items} x {batch.row_tokens} tokens "
            f"takes {asked.gib:.1f} GiB on each of {gpus} GPUs ({placement}), above {room}; {remedy}"
        )
    return [f"{placement}: {asked.gib:.1f} GiB at the largest micro-batch, of {room}"]


def _warn_of_tables(job: Job, plan: StagePlan) -> StagePlan:
    """What of a large corpus was never measured: the table that every rank reads, the plan of an epoch."""
    if job.corpus.num_all > 20e6:
        plan.notes.append(
            f"{job.corpus.num_all / 1e6:,.0f}M utterances: every rank reads the set's whole table and plans whole "
            "epochs; not measured above 10M: cut the corpus into several sets"
        )
    return plan
