"""A trained mapper as a folder that answers: the checkpoint, what it was trained for, and a card of the run."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sm_train import config, files
from sm_train.chat import Chat
from sm_train.data.mds import file_digest
from sm_train.data.mixing import Sources
from sm_train.data.target_set import TargetSet
from sm_train.errors import UserError
from sm_train.exported import card
from sm_train.exported.processor import SpeechFeatureExtractor
from sm_train.exported.settings import INSIDE, MAPPER, STATE, TARGETS, WEIGHTS, SpeechLlmConfig
from sm_train.models import adapter, checkpoints
from sm_train.models.embedding import require_embeddings
from sm_train.models.llm import DTYPES, greedy, read_generation
from sm_train.models.speech import EncoderConfig, SpeechEncoder
from sm_train.models.tokenizer import read_tokenizer, tokenizer_hash
from sm_train.scoring import mappers
from sm_train.scoring.decode import TRIMS
from sm_train.scoring.mappers import Trained
from sm_train.train import checkpoint

_MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja")
_OF_TARGETS = ("tokenizer_hash", "pad_id", "pad_token", "normaliser", "mean_square", "embedding_hash", "width")


@dataclass(frozen=True)
class ExportConfig:
    """What is exported, and how."""

    run: str = config.key(config.REQUIRED, "run folder of pretrain or tune, or a checkpoint folder")
    to: str = config.key(config.REQUIRED, "folder to write; it must not exist")
    checkpoint: str = config.key("best", "best | latest: of a run folder")
    with_models: bool = config.key(False, "also copy the encoder and the LLM, so that the folder answers on its own")
    shards: str | None = config.key(None, "shard set of the training; null: where the run's config says")
    target: str | None = config.key(None, "name of its target set; null: the run's")
    speech_encoder: str | None = config.key(None, "folder of the encoder; null: where the run says")
    llm: str | None = config.key(None, "folder of the LLM; null: where the run says")
    dtype: str = config.key("float32", "precision of the LLM unless one asks otherwise: float32 | bfloat16 | float16")
    trim: str | None = config.key(None, "where stage 1's text ends: change_point | first_pad | none; null: the run's")
    max_new_tokens: int = config.key(150, "longest answer unless one asks otherwise")
    results: str | None = config.key(None, "folder with the evaluation to show on the card; null: the run's own")
    licence: str | None = config.key(None, "licence for the card, as apache-2.0; null: what is known of the encoder's")

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")
        if self.trim is not None and self.trim not in TRIMS:
            raise ValueError(f"trim is {self.trim!r}; it must be one of {', '.join(TRIMS)}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")


def export(cfg: ExportConfig) -> Path:
    """Write the folder, whole or not at all.

    Raises:
        UserError: it exists, the run has no mapper, or its data or models are not there or are others.
    """
    to = Path(cfg.to)
    with _aside(to) as aside:
        trained = _trained(cfg)
        settings = _settings(cfg, trained)
        _copy_checkpoint(trained, aside / MAPPER)
        sources = Sources(settings["shards"], settings["target"])
        read_here = {**files.read_json(sources.folders[0] / "dataset.json"), **sources.targets.contract}
        trained.require_frozen(read_here)
        encoder = _write_encoder(cfg, trained, read_here, aside)
        llm = _write_llm(cfg, trained, read_here, sources.sets, aside)
        rows = {"ids": torch.from_numpy(sources.targets.token_ids), "rows": sources.targets.rows_RD}
        save_file(rows, aside / TARGETS)
        os.chmod(aside / TARGETS, aside.stat().st_mode & 0o666)  # safetensors lets nobody else read what it writes
        asked_trim = cfg.trim or settings.get("trim", mappers.TUNED_TRIM)
        said = SpeechLlmConfig(
            architectures=["SpeechLlm"],
            dtype=cfg.dtype,
            system=trained.name,
            speech_encoder=encoder,
            llm=llm,
            targets={name: sources.targets.contract[name] for name in _OF_TARGETS},
            # As the mapper is heard, which need not be as asked: see Trained.as_system.
            trim=trained.as_system(sources.targets, asked_trim, torch.device("cpu")).trim,
        )
        said.save_pretrained(aside)
        seen = card.read(trained, sources, Path(cfg.results) if cfg.results else trained.run)
        if cfg.results and not seen.results:
            raise UserError(
                f"results={cfg.results} holds no scores of these weights; name an evaluation of {trained.folder}"
            )
        if not seen.results:
            print("no scores for the card: give results=FOLDER of an evaluation of these weights", file=sys.stderr)
        files.write_text(aside / "README.md", card.write(to.name, said, seen, cfg.licence))
    return to


@contextmanager
def _aside(to: Path) -> Iterator[Path]:
    """A folder that takes its name once it is whole."""
    if to.exists() or to.is_symlink():
        raise UserError(f"{to} exists already; remove it, or name another folder with --to")
    aside = to.with_name(f"{files.ASIDE}{to.name}-{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in sorted(aside.rglob("*")):
            files.sync(path)
        files.sync(aside)
        os.rename(aside, to)
        files.sync(to.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _trained(cfg: ExportConfig) -> Trained:
    """The checkpoint and the run it is of: a checkpoint folder lies in RUN/checkpoints, unless it was copied."""
    folder = checkpoint.find(Path(cfg.run), cfg.checkpoint).resolve()
    run = folder.parents[1] if folder.parent.name == "checkpoints" else folder
    return mappers.read(run, folder)


def _settings(cfg: ExportConfig, trained: Trained) -> dict[str, Any]:
    """The run's config, with what was asked for in its place."""
    path = trained.run / "config.yaml"
    settings = config.read_yaml(path) if path.exists() else {}
    settings |= {name: value for name in ("shards", "target") if (value := getattr(cfg, name)) is not None}
    if missing := [name for name in ("shards", "target") if name not in settings]:
        raise UserError(f"{trained.folder} lies in no run folder; give {' and '.join(f'{n}=...' for n in missing)}")
    return settings


def _copy_checkpoint(trained: Trained, to: Path) -> None:
    """The checkpoint in its own format, with the LLM's adapter where it has one, without the moments."""
    to.mkdir()
    of_adapter = [adapter.WEIGHTS, adapter.CONFIG] if adapter.folder_of(trained.folder) else []
    for name in (WEIGHTS, "config.json", *of_adapter):
        shutil.copyfile(trained.folder / name, to / name)
    state = files.read_object(trained.folder / STATE)
    digests = {name: file_digest(to / name) for name in (WEIGHTS, *of_adapter[:1])}
    for name, digest in digests.items():
        if state.get("files", {}).get(name, digest) != digest:
            raise UserError(f"checkpoint {trained.folder} is damaged: the bytes of {name} are not those written")
    files.write_json(to / STATE, {**state, "files": digests})


def _write_encoder(cfg: ExportConfig, trained: Trained, read_here: dict[str, Any], aside: Path) -> dict[str, Any]:
    """The files of the encoder's input; returns what config.json says of it."""
    path, revision = cfg.speech_encoder or trained.contract["encoder"], trained.contract["encoder_revision"]
    revision = None if cfg.speech_encoder else revision
    asked = EncoderConfig(
        path, revision, trained.contract["layer"], trained.contract["pool"], read_here["compute_dtype"], "cpu"
    )
    encoder = SpeechEncoder(asked)
    if encoder.weights_hash != read_here["encoder_hash"]:
        raise UserError(
            f"speech encoder {path}: its weights are not those that the features come from; name their folder as "
            "speech_encoder=..."
        )
    inputs = json.loads(encoder.inputs.to_json())
    extractor = SpeechFeatureExtractor(inputs, encoder.shortest_samples, encoder.longest_samples)
    extractor.save_pretrained(aside)
    folder = checkpoints.resolve(path, revision, "speech encoder")
    of_checkpoint = {name: getattr(asked, name) for name in ("layer", "pool", "dtype")}
    hashes = {"weights_hash": encoder.weights_hash, "settings_hash": encoder.settings_hash}
    return {**_place(cfg, path, revision, folder, aside / "encoder"), **of_checkpoint, **hashes}


def _write_llm(
    cfg: ExportConfig, trained: Trained, read_here: dict[str, Any], sets: Sequence[TargetSet], aside: Path
) -> dict[str, Any]:
    """Tokenizer, template and generation settings; returns what config.json says of the LLM."""
    path, revision = cfg.llm or trained.contract["llm"], trained.contract["llm_revision"]
    revision = None if cfg.llm else revision
    folder = checkpoints.resolve(path, revision, "LLM")
    tokenizer = read_tokenizer(folder)
    hashed = checkpoints.fingerprint(folder)
    same = tokenizer_hash(tokenizer) == read_here["tokenizer_hash"]
    if not same or trained.contract.get("llm_hash", hashed) != hashed:
        raise UserError(f"LLM {path} is not the one that the mapper was trained for; name its folder as llm=...")
    settings = greedy(read_generation(folder), Chat(tokenizer))
    settings.max_new_tokens = cfg.max_new_tokens
    settings.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    assert tokenizer_hash(read_tokenizer(aside)) == read_here["tokenizer_hash"]
    for targets in sets:
        require_embeddings(folder, targets)
    return {**_place(cfg, path, revision, folder, aside / "llm"), "hash": hashed}


def _place(cfg: ExportConfig, path: str, revision: str | None, folder: Path, copy: Path) -> dict[str, Any]:
    """Where a frozen model is found from the exported folder: inside it, in a folder of this machine, or on the hub."""
    if not cfg.with_models:
        return {"path": str(folder.resolve()) if Path(path).is_dir() else path, "revision": revision}
    copy.mkdir()
    for name in sorted({found.name for pattern in _MODEL_FILES for found in folder.glob(pattern)}):
        shutil.copyfile(folder / name, copy / name)  # through the links of the hub's cache
    return {"path": f"{INSIDE}{copy.name}", "revision": None}
