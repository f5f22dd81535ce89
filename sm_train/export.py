"""Export a trained mapper as a folder that people load and use.

    python -m sm_train.export RUN --to FOLDER [--with-models] [key=value ...]
    python -m sm_train.export RUN|FOLDER --prompt-embeds AUDIO "PROMPT" --to FILE.safetensors|FILE.pt

RUN is a run folder of pretrain or tune, or a checkpoint folder. The second form writes a prompt about a recording as
input embeddings [L, D], as vLLM takes them: tensor "prompt_embeds" of a .safetensors, or what torch.save makes of it.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from sm_train import config, files
from sm_train.errors import UserError, run_command
from sm_train.exported import SpeechLlm, SpeechLlmConfig
from sm_train.exported.writing import ExportConfig, export

USAGE = "usage: python -m sm_train.export RUN --to FOLDER [--with-models] [key=value ...]"
_SUFFIXES = (".safetensors", ".pt")


def write_prompt_embeds(path: Path, recording: str, prompt: str, to: Path, words: list[str]) -> None:
    """The prompt about a recording as the LLM's input embeddings, in a file.

    Args:
        path: an exported folder, or a run.
        words: key=value of the export of a run.

    Raises:
        UserError: the model cannot be loaded, or the recording or the prompt cannot be used.
    """
    if to.suffix not in _SUFFIXES or to.exists():
        why = "exists already" if to.exists() else f"is no {' or '.join(_SUFFIXES)}"
        raise UserError(f"{to} {why}; name another file with --to")
    with tempfile.TemporaryDirectory() as folder:
        if _is_exported(path):
            if words:
                raise UserError(f"{words[0]!r} says how a run is exported, but {path} is exported already")
            model = SpeechLlm.from_pretrained(path)
        else:
            model = SpeechLlm.from_pretrained(export(_read([str(path), f"to={folder}/export", *words])))
        prompt_LD = model.prompt_embeds(recording, prompt).contiguous()
        if model.has_adapter:
            print("warning: this mapper was trained with an adapter of the LLM, which vLLM needs too", file=sys.stderr)
    if to.suffix == ".pt":
        files.write_whole(to, lambda aside: torch.save(prompt_LD, aside))
    else:
        files.write_whole(to, lambda aside: save_file({"prompt_embeds": prompt_LD}, aside))
    os.chmod(to, 0o666 & ~_umask())
    print(f"{to}: {len(prompt_LD)} input embeddings of width {prompt_LD.shape[1]}, {prompt_LD.dtype}")


def _is_exported(path: Path) -> bool:
    settings = path / "config.json"
    return settings.is_file() and files.read_object(settings).get("model_type") == SpeechLlmConfig.model_type


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


def _read(words: list[str]) -> ExportConfig:
    run, *rest = words
    return config.from_words(ExportConfig, [f"run={run}", *rest], "sm_train.export")


def _take(words: list[str], option: str, count: int) -> list[str] | None:
    """The ``count`` words behind an option, taken out of ``words`` with it; None where it is not given."""
    if option not in words:
        return None
    at = words.index(option)
    taken = words[at + 1 : at + 1 + count]
    if len(taken) < count:
        raise UserError(f"{option} needs {count} more word{'s' * (count > 1)}; {USAGE}")
    del words[at : at + 1 + count]
    return taken


def main(argv: list[str]) -> None:
    if any(word in ("-h", "--help") for word in argv):
        print(f"{__doc__}\nkeys:\n{config.describe(ExportConfig)}")
        return
    words = list(argv)
    asked = _take(words, "--prompt-embeds", 2)
    if to := _take(words, "--to", 1):
        words.append(f"to={to[0]}")
    if _take(words, "--with-models", 0) is not None:
        words.append("with_models=true")
    if unknown := [word for word in words if word.startswith("-")]:
        raise UserError(f"option {unknown[0]!r} is unknown; {USAGE}")
    if not words or "=" in words[0]:
        raise UserError(f"no run is named; {USAGE}")
    if asked:
        files_named = [word.partition("=")[2] for word in words if word.startswith("to=")]
        if not files_named:
            raise UserError("--prompt-embeds needs --to FILE.safetensors")
        rest = [word for word in words[1:] if not word.startswith("to=")]
        recording, prompt = asked
        write_prompt_embeds(Path(words[0]), recording, prompt, Path(files_named[-1]), rest)
        return
    folder = export(_read(words))
    print(f'{folder}: written\n  SpeechLlm.from_pretrained("{folder}").generate("question.wav", "PROMPT")')


if __name__ == "__main__":
    run_command(main)
