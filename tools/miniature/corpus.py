"""Make a corpus of the miniature world: speech, manifest and instructions.

    python -m tools.miniature.corpus configs/miniature/easy.yaml [key=value ...]

Every row depends on the config alone, not on the number of workers; a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sm_train.config import REQUIRED, dump, fingerprint, key, load, read_yaml, to_mapping
from sm_train.errors import UserError, run_command
from tools.miniature import lexicon, speech
from tools.miniature.forms import word_forms
from tools.miniature.world import Sentence, World, WorldConfig

SPLITS = ("train", "valid", "test", "test_voices")
NOT_CONTENT = ("out", "workers")
MAX_REPEATS = 20
Row = dict[str, Any]


@dataclass(frozen=True)
class CorpusConfig:
    """What to make."""

    out: str = key(REQUIRED, "folder to write; the same command continues an interrupted one")
    seed: int = key(1, "sentences, voices and speech follow from it")
    world: WorldConfig = key(WorldConfig(), "the language")
    train: int = key(4000, "training utterances")
    valid: int = key(200, "validation utterances, known voices")
    test: int = key(200, "test utterances, known voices")
    test_voices: int = key(200, "test utterances, held-out voices")
    noise_snr_db: float | None = key(None, "white noise at this signal-to-noise ratio; null for clean speech")
    workers: int = key(2, "processes that synthesise; changes no result")

    def __post_init__(self) -> None:
        for name in SPLITS:
            if getattr(self, name) < 0:
                raise ValueError(f"key {name!r} is {getattr(self, name)}; give 0 or more")
        if self.workers < 1:
            raise ValueError(f"key 'workers' is {self.workers}; give 1 or more")
        if self.seed < 0:
            raise ValueError(f"key 'seed' is {self.seed}; give 0 or more")


@dataclass(frozen=True, slots=True)
class Planned:
    """One utterance before it is spoken."""

    id: str
    split: str
    voice: speech.Voice
    sentence: Sentence


def main(argv: list[str]) -> None:
    """The command."""
    config = load(CorpusConfig, argv, "tools.miniature.corpus")
    out = Path(config.out)
    content = {name: value for name, value in to_mapping(config).items() if name not in NOT_CONTENT}
    _refuse_other_config(out, content)
    if _is_done(out, fingerprint(content)):
        _write_words(config.world, out)  # a folder from before there were lexicons
        print(f"{out} is complete; nothing to do")
        return
    dump(config, out / "config.yaml")
    planned = plan(config)
    num_frames = _speak_all(planned, config, out)
    manifest = [_manifest_row(item, frames) for item, frames in zip(planned, num_frames, strict=True)]
    _write_table(manifest, out / "manifest.parquet")
    _write_table([row for item in planned for row in _instructions(item, config.seed)], out / "instructions.parquet")
    _write_words(config.world, out)
    done = {
        "fingerprint": fingerprint(content),
        "num_utterances": len(planned),
        "sha256": {name: _sha256(out / name) for name in ("manifest.parquet", "instructions.parquet")},
    }
    _replace(out / "_DONE.json", json.dumps(done, indent=2).encode())
    hours = sum(num_frames) / speech.SAMPLE_RATE_HZ / 3600
    print(f"{out}: {len(planned)} utterances, {hours:.2f} h of speech")


def plan(config: CorpusConfig) -> list[Planned]:
    """Every utterance of the corpus, train first, no sentence twice.

    Raises:
        UserError: a split asks for more sentences than the world easily gives.
    """
    world = World(config.world)
    planned: list[Planned] = []
    seen: set[str] = set()
    for number, split in enumerate(SPLITS):
        rng = np.random.default_rng([config.seed, number])
        voices = speech.HELD_OUT_VOICES if split == "test_voices" else speech.TRAIN_VOICES
        for index in range(getattr(config, split)):
            sentence = _fresh(world, rng, split, seen)
            seen.add(sentence.text)
            planned.append(Planned(f"{split}-{index:06d}", split, voices[int(rng.integers(len(voices)))], sentence))
    return planned


def _fresh(world: World, rng: np.random.Generator, split: str, seen: set[str]) -> Sentence:
    for _ in range(MAX_REPEATS):
        sentence = world.sample(rng, "test" if split == "test_voices" else split)
        if sentence.text not in seen:
            return sentence
    raise UserError(f"key {split!r}: the world has too few different sentences; ask for fewer or add patterns")


def _speak_all(planned: list[Planned], config: CorpusConfig, out: Path) -> list[int]:
    """Write every FLAC file that is not there yet; the number of samples of each, in order."""
    from tqdm import tqdm

    folder = out / "audio"
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*"):
        leftover.unlink()
    jobs = [(item, folder, config.seed, config.noise_snr_db) for item in planned]
    pool = (
        ProcessPoolExecutor(config.workers, multiprocessing.get_context("spawn"))
        if config.workers > 1
        else nullcontext()
    )
    with pool as executor:
        results: Iterator[int] = executor.map(_speak, jobs, chunksize=16) if executor else map(_speak, jobs)
        every_s = 0.5 if sys.stderr.isatty() else 30.0
        return list(tqdm(results, total=len(jobs), unit=" utterances", desc="speaking", mininterval=every_s))


def _speak(job: tuple[Planned, Path, int, float | None]) -> int:
    import soundfile

    item, folder, seed, noise_snr_db = job
    path = folder / f"{item.id}.flac"
    if path.exists():
        return int(soundfile.info(path).frames)
    audio = speech.utter(item.sentence.text, item.voice, _rng_of(seed, item.id, "speech"), noise_snr_db)
    aside = folder / f".{item.id}.{os.getpid()}.flac"
    soundfile.write(aside, audio, speech.SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
    os.replace(aside, path)
    return int(audio.size)


def _manifest_row(item: Planned, num_frames: int) -> Row:
    return {
        "id": item.id,
        "audio": f"audio/{item.id}.flac",
        "start_s": 0.0,
        "duration_s": num_frames / speech.SAMPLE_RATE_HZ,
        "text": item.sentence.text,
        "lang": "en",
        "speaker": item.voice.name,
        "split": item.split,
    }


def _instructions(item: Planned, seed: int) -> list[Row]:
    """Transcription, both translations and one question."""
    questions = item.sentence.questions
    question = questions[int(_rng_of(seed, item.id, "question").integers(len(questions)))]
    tasks: tuple[tuple[str, dict[str, str], str, str], ...] = (
        ("asr", {}, "en", item.sentence.text),
        ("st", {}, "fr", item.sentence.french),
        ("st", {}, "de", item.sentence.german),
        ("sqa", {"question": question.question}, "en", question.answer),
    )
    return [
        {
            "utterance_id": item.id,
            "task": task,
            "variables": json.dumps(variables),
            "target_lang": lang,
            "answer": answer,
        }
        for task, variables, lang, answer in tasks
    ]


def _rng_of(seed: int, name: str, purpose: str) -> np.random.Generator:
    digest = hashlib.blake2b(f"{purpose} {name}".encode(), digest_size=8).digest()
    return np.random.default_rng([seed, int.from_bytes(digest, "big")])


def _refuse_other_config(out: Path, content: dict[str, Any]) -> None:
    if not (out / "config.yaml").is_file():
        return
    there = {name: value for name, value in read_yaml(out / "config.yaml").items() if name not in NOT_CONTENT}
    differing = sorted(name for name in {*there, *content} if there.get(name) != content.get(name))
    if differing:
        name = differing[0]
        raise UserError(
            f"{out} was made with {name}={there.get(name)!r}, not {content.get(name)!r}; "
            "use that value, give another out=, or delete the folder"
        )


def _is_done(out: Path, expected: str) -> bool:
    done = out / "_DONE.json"
    return done.is_file() and json.loads(done.read_text())["fingerprint"] == expected


def _write_words(world: WorldConfig, out: Path) -> None:
    """lexicon.json: the words of each language, by which an evaluation tells them apart."""
    path = out / "lexicon.json"
    if not path.exists():
        _replace(path, json.dumps(word_forms(lexicon.read(world.level)), ensure_ascii=False, indent=0).encode())


def _write_table(rows: list[Row], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    _replace(path, sink.getvalue().to_pybytes())


def _replace(path: Path, data: bytes) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(data)
    os.replace(aside, path)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    run_command(main)
