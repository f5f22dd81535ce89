"""What a config names: is it there, whole, and what the stage can begin with?"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from cluster.doctor.findings import FAIL, OK, SKIP, WARN, Check, Finding
from cluster.doctor.work import Work
from cluster.fit import hub
from cluster.fit.shapes import llm_of
from sm_train.data import manifest, shards
from sm_train.data.loader import plan_items
from sm_train.data.mixing import MixedItems, Sources
from sm_train.errors import UserError
from sm_train.models.mapper import SpeechMapper
from sm_train.models.speech import CtcHead
from sm_train.prompts import read_prompts
from sm_train.train import checkpoint
from sm_train.train.origin import SCRATCH

_SAMPLED = 5  # recordings of a manifest


def checks(work: Work) -> list[Check]:
    """Those of a stage's inputs."""
    cfg = work.cfg
    if work.stage == "precompute":
        found = [Check("manifest", lambda: corpus(work), 30.0), Check("encoder", lambda: model("encoder", cfg.encoder))]
        return [*found, *(Check("llm", partial(_model, "llm", t.llm, t.revision)) for t in cfg.targets)]
    found = [Check("shards", lambda: shard_sets(work), 30.0)]
    if work.stage == "tune":
        found += [Check("mapper", lambda: mapper(cfg.mapper, "best"))] if cfg.mapper != SCRATCH else []
        found += [Check("prompts", lambda: prompts(work))]
        found += [Check("llm", lambda: llm_of_targets(work), 30.0)]
    if work.stage == "evaluate":
        found += [Check("mapper", lambda: mapper(cfg.run, cfg.checkpoint))] if cfg.run else []
        found += [Check("mapper", partial(mapper, run, "best")) for run in cfg.tuned]
        found += [Check("questions", lambda: questions(work), 30.0), Check("llm", lambda: model("llm", cfg.llm), 30.0)]
        if cfg.cascade:
            found.append(Check("cascade", lambda: cascade(cfg.cascade)))
    return found


def corpus(work: Work) -> Finding:
    """The manifest, and a few of its recordings."""
    utterances, path = work.utterances, str(work.cfg.manifest)
    hours = sum(u.duration_s for u in utterances) / 3600
    sampled = [utterances[i] for i in range(0, len(utterances), -(-len(utterances) // _SAMPLED))]
    near = [Path(manifest.root_of(path), u.audio) for u in sampled if "://" not in u.audio + path]
    text = f"{path}: {len(utterances)} utterances, {hours:.1f} h"
    if missing := [audio for audio in near if not audio.is_file()]:
        remedy = f"audio paths start at {manifest.root_of(path)}: mount or copy the recordings there"
        return Finding(FAIL, "manifest", f"{text}; {missing[0]} does not exist", remedy)
    return Finding(OK, "manifest", f"{text}; {len(near)} sampled recordings are there")


def model(name: str, cfg: Any) -> Finding:
    """A model that a config's section names by path and revision."""
    return _model(name, cfg.path, cfg.revision)


def _model(name: str, path: str, revision: str | None) -> Finding:
    answer = hub.ask(path, revision)
    return Finding(OK if answer.is_had else FAIL, name, answer.text, answer.remedy)


def llm_of_targets(work: Work) -> Finding:
    """The LLM of stage 2: the config's, or the one that its targets came from."""
    if not work.cfg.llm and "://" in work.cfg.shards:
        return Finding(SKIP, "llm", "llm is not set, and the targets that name it are far away")
    return _model("llm", *llm_of(work.cfg))


def shard_sets(work: Work) -> Iterator[Finding]:
    """Shard sets with their targets: whole, of one encoder and LLM, with the splits, and plannable."""
    cfg = work.cfg
    far, cache = [uri for uri in work.shard_sets if "://" in uri], getattr(getattr(cfg, "loader", None), "cache", None)
    if far or cache:
        if not cache:
            remedy = "set loader.cache to a folder on a local disk" if work.is_training else "evaluate reads folders"
            yield Finding(FAIL, "shards", f"{far[0]} is far away, and nothing says where to keep it", remedy)
        else:
            yield Finding(SKIP, "shards", "a mirrored set's tables are read when the run starts; see storage")
        return
    sources = Sources(cfg.shards, cfg.target)
    for folder in sources.folders:
        yield _parts(folder)
    training = sources.training(cfg.splits, getattr(cfg, "seed", 0))
    hours = float(training.duration_s.sum()) / 3600
    text = f"{len(training)} utterances, {hours:.2f} h of {', '.join(cfg.splits)}, features of {training.feature_width}"
    if valid := getattr(cfg, "valid_splits", []):
        text += f"; {len(sources.validation(valid))} of {', '.join(valid)}"
    if work.stage == "pretrain":
        batch = cfg.batch
        if isinstance(training, MixedItems):
            training.set_epoch_steps(batch.epoch_steps, batch.frames, batch.lanes, batch.window)
        if training.feature_width != cfg.mapper.widths[0]:
            text = f"mapper.widths[0] is {cfg.mapper.widths[0]}, the features are {training.feature_width} wide"
            yield Finding(FAIL, "shards", text, f"set mapper.widths=[{training.feature_width},...]")
            return
        planner = plan_items(training, cfg.seed, batch.frames, batch.lanes, batch.window)
        text += f"; {planner.epoch(0).num_steps} steps an epoch"
    yield Finding(OK, "shards", text)


def _parts(folder: Path) -> Finding:
    """Whether every part that a set's table names is there, whole."""
    named = shards.read_table(folder, "utterances.parquet").column("part").unique().to_pylist()
    if absent := sorted(set(named) - shards.committed(folder, named)):
        text = f"{folder}: {len(absent)} of {len(named)} parts are gone, the first {absent[0]}"
        return Finding(FAIL, "shards", text, f"restore them, or remove {folder / shards.DATASET} and precompute again")
    return Finding(OK, "shards", f"{folder}: complete, {len(named)} parts")


def mapper(run: str, name: str) -> Finding:
    """A trained mapper, which is read as the stage will read it."""
    found = checkpoint.find(Path(run), name)
    read = SpeechMapper.from_pretrained(found)
    return Finding(OK, "mapper", f"{found}: {read.num_parameters:,} parameters, {read.output_width} wide")


def prompts(work: Work) -> Finding:
    """Prompts for every task of stage 2, and the tasks themselves."""
    cfg = work.cfg
    kinds = sorted({task.partition("-")[0] for task in cfg.shares})
    wordings = read_prompts(Path(cfg.prompts))
    count = sum(len(wordings.of(kind, "train")) for kind in kinds)
    if "://" not in cfg.shards and not (Path(cfg.shards) / "targets" / cfg.target / "tasks.parquet").is_file():
        how = f"python -m cluster.retarget {cfg.shards} --name {cfg.target} --instructions FILE"
        return Finding(FAIL, "prompts", f"target set {cfg.target} of {cfg.shards} has no tasks", how)
    return Finding(OK, "prompts", f"{cfg.prompts}: {count} wordings of {', '.join(kinds)}")


def questions(work: Work) -> Finding:
    """Instructions and prompts of an evaluation, and its optional files."""
    cfg = work.cfg
    tasks = manifest.read_instructions(Path(cfg.instructions))
    wordings = read_prompts(Path(cfg.prompts))
    for kind in sorted({task.task for task in tasks}):
        for group in cfg.groups:
            wordings.of(kind, group)
    if cfg.lexicon and not Path(cfg.lexicon).is_file():
        raise UserError(f"lexicon {cfg.lexicon} does not exist; mend the path, or set lexicon=null")
    text = f"{cfg.instructions}: {len(tasks)} tasks"
    if cfg.audio_root and not Path(cfg.audio_root).is_dir():
        return Finding(WARN, "questions", f"{text}; audio_root {cfg.audio_root} does not exist", "set audio_root=null")
    return Finding(OK, "questions", text)


def cascade(folder: str) -> Finding:
    """The recogniser of the cascade."""
    return Finding(OK, "cascade", f"{folder}: {len(CtcHead(Path(folder)).characters)} characters")
