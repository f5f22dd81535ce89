"""Builders of small real things for tests: checkpoints in their Hugging Face formats, a corpus of synthetic audio."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

ROOT = Path(__file__).parents[1]
RATE_HZ = 16_000
WORDS = ["the", "red", "green", "small", "old", "boat", "house", "river", "bird", "runs", "sees", "two", "stones"]


def run_module(module: str, *argv: object, timeout_s: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m module argv`` as a person would, with one thread."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, argv)],
        cwd=ROOT, env=child_env(**env), capture_output=True, text=True, timeout=timeout_s,
    )  # fmt: skip


def child_env(**env: str) -> dict[str, str]:
    """The environment of a child process."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **env}


def corpus(folder: Path, count: int, seed: int = 0) -> Path:
    """FLAC files of 1 to 3 s, tones in noise, with a manifest; returns the manifest's path."""
    rng = np.random.default_rng(seed)
    rows = []
    (folder / "audio").mkdir(parents=True)
    for i in range(count):
        samples_S = tones(rng, float(rng.uniform(1.0, 3.0)))
        soundfile.write(folder / f"audio/{i:03d}.flac", samples_S, RATE_HZ)
        text = " ".join(rng.choice(WORDS, size=2 + len(samples_S) // RATE_HZ))
        rows.append(
            row(f"utt-{i:03d}", f"audio/{i:03d}.flac", len(samples_S) / RATE_HZ, text, "train" if i % 4 else "dev")
        )
    return write_manifest(folder / "manifest.parquet", rows)


def tones(rng: np.random.Generator, duration_s: float) -> np.ndarray:
    """Bursts of a few tones in noise [S]."""
    time_S = np.arange(round(duration_s * RATE_HZ)) / RATE_HZ
    samples_S = 0.01 * rng.normal(size=len(time_S))
    for pitch_hz in rng.uniform(120, 3000, size=4):
        samples_S += 0.1 * np.sin(2 * np.pi * pitch_hz * time_S) * (np.sin(2 * np.pi * rng.uniform(1, 4) * time_S) > 0)
    return samples_S.astype(np.float32)


def row(id: str, audio: str, duration_s: float, text: str, split: str = "train") -> dict[str, Any]:
    """A manifest row."""
    return {"id": id, "audio": audio, "start_s": 0.0, "duration_s": duration_s, "text": text,
            "lang": "en", "speaker": "s", "split": split}  # fmt: skip


def write_manifest(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows as Parquet or JSONL, by the suffix."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def recommit(path: Path) -> None:
    """Let a complete set's ``dataset.json`` agree with a table of it that a test has rewritten."""
    from sm_train.data import mds

    dataset = json.loads((path.parent / "dataset.json").read_text())
    dataset["table_hashes"][path.name] = mds.file_digest(path)
    (path.parent / "dataset.json").write_text(json.dumps(dataset))


def seamless(folder: Path, layers: int = 3, sharded: bool = False, **settings: Any) -> Path:
    """A tiny random SeamlessM4T-v2 checkpoint: its speech encoder's tensors among those of other parts."""
    import torch
    from transformers import SeamlessM4TFeatureExtractor, SeamlessM4Tv2Config
    from transformers.models.seamless_m4t_v2.modeling_seamless_m4t_v2 import SeamlessM4Tv2SpeechEncoder

    torch.manual_seed(1)
    config = SeamlessM4Tv2Config(
        hidden_size=32, speech_encoder_layers=layers, speech_encoder_attention_heads=2,
        speech_encoder_intermediate_size=48, architectures=["SeamlessM4Tv2Model"], **settings,
    )  # fmt: skip
    model = SeamlessM4Tv2SpeechEncoder(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # at the default scale every layer would be close to the identity
    tensors = {f"speech_encoder.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {"shared.weight": torch.zeros(5, 32), "vocoder.conv.bias": torch.zeros(3)}
    config.save_pretrained(folder)
    SeamlessM4TFeatureExtractor().save_pretrained(folder)
    save_weights(folder, tensors, sharded)
    return folder


def save_weights(folder: Path, tensors: dict[str, Any], sharded: bool) -> None:
    """Write safetensors as one file, or as two with an index."""
    from safetensors.torch import save_file

    if not sharded:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    places = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(places.values())):
        save_file({n: tensors[n] for n in names if places[n] == file}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def without(folder: Path, ending: str) -> Path:
    """Take tensors whose names end so out of a checkpoint in one file; returns its folder."""
    from safetensors.torch import load_file

    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if not n.endswith(ending)}
    save_weights(folder, tensors, sharded=False)
    return folder


def weight_names(folder: Path) -> list[str]:
    """The names of all tensors of a checkpoint."""
    from safetensors import safe_open

    names: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            names += tensors.keys()
    return names


def tokenizer(folder: Path, pad_token: str | None = "<pad>") -> Any:
    """A byte-level BPE tokenizer that knows :data:`WORDS`, in the LLM's folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<spare>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([" ".join([word, word]) for word in WORDS] * 4, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token=pad_token)
    made.save_pretrained(folder)
    return made


def llm(
    folder: Path, sharded: bool = False, family: str = "llama", dtype: str = "float32",
    pad_token: str | None = "<pad>", extra_rows: int = 0, zero_pad: bool = False, **settings: Any,
) -> Path:  # fmt: skip
    """A tiny random LLM with its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(2)
    folder.mkdir(parents=True)
    made = tokenizer(folder, pad_token)
    config = AutoConfig.for_model(
        family, vocab_size=len(made) + extra_rows, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        **settings,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad():
        table_VD = model.get_input_embeddings().weight
        table_VD.normal_()
        if zero_pad:
            table_VD[2] = 0.0
    model.config.save_pretrained(folder)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    save_weights(folder, tensors, sharded)
    return folder
