"""Hugging Face checkpoint folders: found, listed, and read tensor by tensor (safetensors only)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sm_train import files
from sm_train.errors import UserError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_STRETCHES, _STRETCH_BYTES = 16, 1 << 16


def resolve(path: str, revision: str | None, what: str) -> Path:
    """The local folder of a checkpoint: a folder as it is, a hub repository from the local cache or the hub.

    Raises:
        UserError: neither a folder nor a repository that can be had.
    """
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{what} {path}: the folder has no config.json")
        return folder
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(f"{what} {path}: the folder does not exist")
    from huggingface_hub import constants, snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.jinja"]
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except Exception as error:
        if constants.HF_HUB_OFFLINE:
            raise UserError(
                f"{what} {path}: neither a folder here nor in the hub's cache, and HF_HUB_OFFLINE is set; fetch it "
                "with python -m tools.fetch CONFIG --to DIR on a machine with internet, and name the folder instead"
            ) from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{what} {path}: neither a folder here nor to be had from the hub ({reason})") from None


def fingerprint(folder: Path) -> str:
    """A hash of config.json and of stretches of every weight file, spread over it; small files are hashed whole.

    Milliseconds for any size. Another training of the same model is another fingerprint; a change of a few numbers in a
    large file may not be.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for stretch in range(_STRETCHES):
                file.seek(max(size - _STRETCH_BYTES, 0) * stretch // (_STRETCHES - 1))
                digest.update(file.read(_STRETCH_BYTES))
    return digest.hexdigest()[:16]


def weight_map(folder: Path) -> dict[str, Path]:
    """Which safetensors file holds each tensor of a checkpoint, sharded or single.

    Raises:
        UserError: there are no safetensors weights.
    """
    if (folder / _INDEX).is_file():
        names = files.read_object(folder / _INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
            raise UserError(f"{folder / _INDEX} has no weight_map of names to files; get the checkpoint again")
        for file in set(names.values()):
            if Path(file).name != file or not (folder / file).is_file():
                raise UserError(f"{folder / _INDEX} names the file {file!r}, which is not in the folder")
        return {name: folder / file for name, file in names.items()}
    if (folder / _SINGLE).is_file():
        with _opened(folder / _SINGLE) as tensors:
            return dict.fromkeys(tensors.keys(), folder / _SINGLE)
    raise UserError(f"{folder} has no {_SINGLE} and no {_INDEX}; only safetensors weights are read")


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}); get the checkpoint again") from None


def read_tensors(folder: Path, names: set[str], what: str) -> dict[str, torch.Tensor]:
    """Read just the named tensors, in the dtype they are stored in.

    Raises:
        UserError: one of them is absent.
    """
    places = weight_map(folder)
    missing = sorted(names - places.keys())
    if missing:
        raise UserError(
            f"{what}: tensor {missing[0]!r} is not in {folder} ({len(missing)} of {len(names)} are missing)"
        )
    found = {}
    for path in sorted({places[name] for name in names}):
        with _opened(path) as tensors:
            for name in sorted(names):
                if places[name] == path:
                    found[name] = tensors.get_tensor(name)
    return found


def first_output(output: Any) -> torch.Tensor:
    """The hidden states of a layer or model, whatever the library wraps them in."""
    if isinstance(output, torch.Tensor):
        return output
    tensor = output[0]
    assert isinstance(tensor, torch.Tensor)
    return tensor
