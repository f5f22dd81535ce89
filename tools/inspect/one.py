"""One utterance of a set in full, and some as sound.

Shape letters: S samples, T frames, E encoder width.
"""

from __future__ import annotations

import random
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sm_train import files
from sm_train.data import shards
from sm_train.data.audio import SAMPLE_RATE_HZ, BadAudio, load
from sm_train.data.lengths import num_positions
from sm_train.data.samples import FEATS, TOKENS
from sm_train.data.target_set import TABLE, TOKENIZER, read_tokenizer
from sm_train.errors import UserError, printable
from tools.inspect import Opened, read_sample
from tools.verify import inside, short


def utterance(found: Opened, name: str, targets: Sequence[str]) -> dict[str, Any]:
    """What a set has of one utterance: its row, its features in figures, its tokens by target set.

    Raises:
        UserError: there is none of that id, or its sample cannot be read.
    """
    ids = found.column("id") if found.columns else []
    if name not in ids:
        for row in found.quarantine:
            if row["id"] == name:
                return {"quarantined": row}
        raise UserError(f"{found.uri} has no utterance {short(name)!r}, neither committed nor quarantined")
    row = found.row(ids.index(name))
    sample, is_whole = read_sample(found, row, FEATS)
    return {
        "row": row,
        "features": {"hash_ok": is_whole, **_figures(sample["feats"])},
        "positions": num_positions(int(row["num_frames"])),
        "targets": {target: _tokens(found, target, name) for target in targets},
    }


def _figures(feats_TE: NDArray[np.float16]) -> dict[str, Any]:
    values = feats_TE.astype(np.float64)
    finite = values[np.isfinite(values)]
    some = finite if finite.size else np.zeros(1)
    return {
        "shape": list(feats_TE.shape),
        "mean": float(some.mean()),
        "rms": float(np.sqrt(np.square(some).mean())),
        "min": float(some.min()),
        "max": float(some.max()),
        "not_finite": int(values.size - finite.size),
    }


def _tokens(found: Opened, target: str, name: str) -> dict[str, Any]:
    """The tokens of one utterance in one target set, and the text that they are."""
    root = found.root / "targets" / target
    if not shards.is_complete(root):
        return {"problem": "the target set is not complete"}
    table = shards.read_table(root, TABLE)
    ids = table.column("id").to_pylist()
    if name not in ids:
        for row in shards.read_table(root, shards.QUARANTINE).to_pylist():
            if row["id"] == name:
                return {"quarantined": row}
        return {"problem": "the target set has no such utterance"}
    row = table.slice(ids.index(name), 1).to_pylist()[0]
    at = Opened(str(root), root, None, True, {}, {}, [], 0, 0, [])
    sample, is_whole = read_sample(at, row, TOKENS)
    numbers = sample["tokens"].tolist()
    tokenizer = read_tokenizer(inside(root, TOKENIZER))
    pieces = [tokenizer.id_to_token(number) for number in numbers]
    text = tokenizer.decode(numbers, skip_special_tokens=True)
    return {"hash_ok": is_whole, "ids": numbers, "pieces": pieces, "text": text}


def in_words(facts: dict[str, Any]) -> list[str]:
    """The lines about one utterance."""
    if row := facts.get("quarantined"):
        return [f"{short(row['id'])}: quarantined as {short(row['reason'])}: {printable(row['detail'], 300)}"]
    figures = facts["features"]
    lines = [f"{key:<12} {printable(value, 400)}" for key, value in facts["row"].items()]
    state = "ok" if figures["hash_ok"] else "NOT OK: these are not the bytes that were committed; see tools.verify"
    numbers = ", ".join(f"{key} {figures[key]:.4g}" for key in ("mean", "rms", "min", "max"))
    strange = f", {figures['not_finite']} numbers NaN or infinite" if figures["not_finite"] else ""
    lines += [f"features     {figures['shape']}, {numbers}{strange}", f"hash         {state}"]
    for name, of in facts["targets"].items():
        if "ids" not in of:
            lines.append(f"targets/{short(name)}: {printable(of.get('problem') or of['quarantined'], 300)}")
            continue
        warning = "" if of["hash_ok"] else " (hash NOT OK)"
        lines.append(f"targets/{short(name)}: {len(of['ids'])} tokens, {facts['positions']} positions{warning}")
        lines += [f"  ids        {of['ids']}", f"  tokens     {printable(of['pieces'], 400)}"]
        lines.append(f"  text       {printable(of['text'], 400)}")
    return lines


def listen(found: Opened, count: int, seed: int, folder: Path, audio_root: Path) -> list[str]:
    """Write some utterances as WAV, at 16 kHz, with their text beside them; names are ordinals.

    Returns:
        A line for each.

    Raises:
        UserError: the audio of not one of them can be read.
    """
    chosen = sorted(random.Random(seed).sample(range(len(found.column("id"))), min(count, len(found.column("id")))))
    lines, num_written = [], 0
    for number in chosen:
        row = found.row(number)
        base = folder / f"{number:08d}"
        try:
            samples_S = load(audio_root / str(row["audio"]), float(row["start_s"]), float(row["duration_s"]))
        except BadAudio as error:
            lines.append(f"{short(row['id'])}: {printable(error, 300)}")
            continue
        files.write_whole(base.with_suffix(".wav"), lambda aside, samples_S=samples_S: _write_wav(aside, samples_S))
        files.write_text(base.with_suffix(".txt"), f"{row['text']}\n")
        lines.append(f"{base.name}.wav  {short(row['id'])}  {printable(row['text'], 200)}")
        num_written += 1
    if chosen and not num_written:
        raise UserError(
            f"none of {len(chosen)} audio files can be read: {lines[0]}; is --audio-root the manifest's folder?"
        )
    return lines


def _write_wav(path: Path, samples_S: NDArray[np.float32]) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE_HZ)
        file.writeframes(np.round(np.clip(samples_S, -1, 1) * 32767).astype("<i2").tobytes())
