"""Small trees in the layouts of corpora and formats: the same few utterances in each."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from tests.builders import RATE_HZ, WORDS, tones


@dataclass(frozen=True)
class Said:
    """One utterance of the tiny corpus; its length is a whole number of 1/64 s, which floats hold exactly."""

    id: str
    samples_S: np.ndarray
    text: str
    speaker: str
    split: str

    @property
    def duration_s(self) -> float:
        return len(self.samples_S) / RATE_HZ


def tiny(count: int = 6) -> list[Said]:
    """Two speakers, each in a chapter of its own, in train and dev; sorted by id."""
    rng = np.random.default_rng(5)
    said = []
    for i in range(count):
        speaker, split = (("84", "train"), ("174", "dev"))[i % 2]
        duration_s = int(rng.integers(64, 128)) / 64
        text = " ".join(rng.choice(WORDS, size=3)).upper()
        said.append(Said(f"{speaker}-1000-{i:04d}", tones(rng, duration_s), text, speaker, split))
    return sorted(said, key=lambda one: one.id)


def write_audio(path: Path, samples_S: np.ndarray, rate_hz: int = RATE_HZ) -> Path:
    """The same 16-bit samples in any format that is lossless: rounded here, since formats round floats differently."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded_S = np.round(np.clip(samples_S, -1, 1) * 32767).astype(np.int16)
    soundfile.write(path, rounded_S, rate_hz, subtype=None if path.suffix == ".mp3" else "PCM_16")
    return path


def write_lines(path: Path, lines: Iterable[str]) -> Path:
    """A text file; .gz is compressed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def of_split(said: Sequence[Said]) -> dict[str, list[Said]]:
    """By split, in the corpus's order."""
    return {split: [one for one in said if one.split == split] for split in ("train", "dev")}


def librispeech(folder: Path, said: Sequence[Said]) -> list[str]:
    """LibriSpeech/train-clean-100 and dev-clean."""
    for one in said:
        split = {"train": "train-clean-100", "dev": "dev-clean"}[one.split]
        chapter = folder / "LibriSpeech" / split / one.speaker / "1000"
        write_audio(chapter / f"{one.id}.flac", one.samples_S)
        with (chapter / f"{one.speaker}-1000.trans.txt").open("a") as file:
            file.write(f"{one.id} {one.text}\n")
    return []


def kaldi(folder: Path, said: Sequence[Said]) -> list[str]:
    """data/train and data/dev without segments."""
    for split, rows in of_split(said).items():
        paths = [write_audio(folder / "wavs" / f"{one.id}.wav", one.samples_S) for one in rows]
        data = folder / split
        write_lines(data / "wav.scp", (f"{one.id} {path}" for one, path in zip(rows, paths, strict=True)))
        write_lines(data / "text", (f"{one.id} {one.text}" for one in rows))
        write_lines(data / "utt2spk", (f"{one.id} {one.speaker}" for one in rows))
        write_lines(data / "utt2lang", (f"{one.id} english" for one in rows))
    return []


def kaldi_segments(folder: Path, said: Sequence[Said]) -> list[str]:
    """A long recording for each split, cut by segments; its path is relative to the data folder."""
    for split, rows in of_split(said).items():
        silence_S, pieces, segments, start_s = np.zeros(RATE_HZ // 2, np.float32), [], [], 0.0
        for one in rows:
            pieces += [silence_S, one.samples_S]
            start_s += 0.5
            segments.append(f"{one.id} long-{split} {start_s} {start_s + one.duration_s}")
            start_s += one.duration_s
        write_audio(folder / "wavs" / f"{split}.wav", np.concatenate([*pieces, silence_S]))
        data = folder / split
        write_lines(data / "wav.scp", [f"long-{split} ../wavs/{split}.wav"])
        write_lines(data / "segments", segments)
        write_lines(data / "text", (f"{one.id} {one.text}" for one in rows))
        write_lines(data / "utt2spk", (f"{one.id} {one.speaker}" for one in rows))
    return ["--lang", "en"]


def recording(one: Said, path: Path) -> dict[str, Any]:
    """A recording of lhotse."""
    return {
        "id": one.id, "sources": [{"type": "file", "channels": [0], "source": str(path)}], "sampling_rate": RATE_HZ,
        "num_samples": len(one.samples_S), "duration": one.duration_s, "channel_ids": [0],
    }  # fmt: skip


def supervision(one: Said) -> dict[str, Any]:
    """A supervision of lhotse."""
    return {
        "id": one.id, "recording_id": one.id, "start": 0.0, "duration": one.duration_s, "channel": 0, "text": one.text,
        "language": "English", "speaker": one.speaker,
    }  # fmt: skip


def lhotse_cuts(folder: Path, said: Sequence[Said]) -> list[str]:
    """cuts.jsonl.gz."""
    cuts = [
        {
            "id": f"{one.id}-0", "start": 0, "duration": one.duration_s, "channel": 0, "type": "MonoCut",
            "supervisions": [supervision(one)],
            "recording": recording(one, write_audio(folder / "audio" / f"{one.id}.flac", one.samples_S)),
        }
        for one in said
    ]  # fmt: skip
    write_lines(folder / "cuts.jsonl.gz", map(json.dumps, cuts))
    return []


def lhotse_pairs(folder: Path, said: Sequence[Said]) -> list[str]:
    """Recordings and supervisions; relative paths."""
    paths = {
        one.id: write_audio(folder / "audio" / f"{one.id}.flac", one.samples_S).relative_to(folder) for one in said
    }
    for split, rows in of_split(said).items():
        recordings = (json.dumps(recording(one, paths[one.id])) for one in rows)
        write_lines(folder / f"tiny_recordings_{split}.jsonl.gz", recordings)
        write_lines(folder / f"tiny_supervisions_{split}.jsonl.gz", (json.dumps(supervision(one)) for one in rows))
    return ["--audio-root", str(folder)]


def nemo(folder: Path, said: Sequence[Said]) -> list[str]:
    """train.json and dev.json beside wavs/; durations are rounded, as many tools round them."""
    for split, rows in of_split(said).items():
        lines = []
        for one in rows:
            path = write_audio(folder / "wavs" / f"{one.id}.wav", one.samples_S).relative_to(folder)
            row = {"audio_filepath": str(path), "duration": round(one.duration_s, 2), "text": one.text, "lang": "en"}
            lines.append(json.dumps({**row, "speaker": one.speaker}))
        write_lines(folder / f"{split}.json", lines)
    return []


def encoded(one: Said, folder: Path) -> bytes:
    """The bytes of a FLAC file."""
    return write_audio(folder / "encoded" / f"{one.id}.flac", one.samples_S).read_bytes()


def hf_table(rows: Sequence[Said], aside: Path) -> pa.Table:
    """A table as the Audio feature stores it."""
    audio = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        "id": pa.array([one.id for one in rows]),
        "audio": pa.array([{"bytes": encoded(one, aside), "path": f"{one.id}.flac"} for one in rows], audio),
        "text": pa.array([one.text for one in rows]),
        "speaker_id": pa.array([int(one.speaker) for one in rows], pa.int64()),
    }
    return pa.table(columns)


def save_to_disk(folder: Path, table: pa.Table, split: str, shards: int = 2) -> None:
    """What datasets.Dataset.save_to_disk writes."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    size = -(-table.num_rows // shards)
    for i, name in enumerate(names):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table.slice(i * size, size))
    state = {"_data_files": [{"filename": name} for name in names], "_split": split, "_fingerprint": "0"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))


def hf(folder: Path, said: Sequence[Said]) -> list[str]:
    """A DatasetDict of train and validation."""
    names = {"train": "train", "dev": "validation"}
    for split, rows in of_split(said).items():
        save_to_disk(folder / names[split], hf_table(rows, folder / "aside"), names[split])
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(names.values())}))
    return ["--lang", "en"]


def hf_parquet(folder: Path, said: Sequence[Said]) -> list[str]:
    """Parquet shards as the hub has them."""
    (folder / "data").mkdir(parents=True)
    for split, rows in of_split(said).items():
        name = {"train": "train", "dev": "validation"}[split]
        pq.write_table(hf_table(rows, folder / "aside"), folder / f"data/{name}-00000-of-00001.parquet")
    return ["--lang", "en"]


def tsv_header(folder: Path, said: Sequence[Said]) -> list[str]:
    """A list with a header."""
    lines = ["id\taudio\ttext\tspeaker\tsplit\tlang"]
    for one in said:
        path = write_audio(folder / "clips" / f"{one.id}.ogg.flac", one.samples_S)
        lines.append("\t".join([one.id, f"clips/{path.name}", one.text, one.speaker, one.split, "en-US"]))
    write_lines(folder / "all.tsv", lines)
    return []


def tsv_fairseq(folder: Path, said: Sequence[Said]) -> list[str]:
    """train.tsv with words, dev.tsv with letters."""
    for split, rows in of_split(said).items():
        paths = [write_audio(folder / "audio" / split / f"{one.id}.flac", one.samples_S) for one in rows]
        listed = [f"{path.relative_to(folder)}\t{len(one.samples_S)}" for path, one in zip(paths, rows, strict=True)]
        write_lines(folder / f"{split}.tsv", [str(folder), *listed])
        letters = (" ".join(one.text.replace(" ", "|")) + " |" for one in rows)
        write_lines(folder / f"{split}.wrd", (one.text for one in rows)) if split == "train" else None
        write_lines(folder / f"{split}.ltr", letters)
    return ["--lang", "en", "--speaker-from", "^([^-]+)-"]


def beside(folder: Path, said: Sequence[Said]) -> list[str]:
    """NAME.txt beside NAME.wav, in a folder of each split's."""
    for one in said:
        path = write_audio(folder / one.split / f"{one.id}.wav", one.samples_S)
        path.with_suffix(".txt").write_text(f"{one.text}\n")
    return ["--lang", "en", "--speaker-from", "^([^-]+)-"]


def ljspeech(folder: Path, said: Sequence[Said]) -> list[str]:
    """metadata.csv over wavs/."""
    for one in said:
        write_audio(folder / "wavs" / f"{one.id}.wav", one.samples_S)
    write_lines(folder / "metadata.csv", (f"{one.id}|{one.text.lower()}|{one.text}" for one in said))
    return ["--lang", "en", "--speaker-from", "^([^-]+)-"]


LAYOUTS: dict[str, tuple[str, Callable[[Path, Sequence[Said]], list[str]], bool]] = {
    "librispeech": ("librispeech", librispeech, True),
    "kaldi": ("kaldi", kaldi, True),
    "kaldi segments": ("kaldi", kaldi_segments, True),
    "lhotse cuts": ("lhotse", lhotse_cuts, False),
    "lhotse recordings": ("lhotse", lhotse_pairs, True),
    "nemo": ("nemo", nemo, True),
    "hf": ("hf", hf, True),
    "hf parquet": ("hf", hf_parquet, True),
    "tsv": ("tsv", tsv_header, True),
    "tsv fairseq": ("tsv", tsv_fairseq, True),
    "folder": ("folder", beside, False),
    "folder ljspeech": ("folder", ljspeech, False),
}
"""Name -> the importer, what builds the tree and gives the options it needs, whether the layout says the split."""
