"""What is known of a model on a hub without fetching it: in this machine's cache, offline, gated, or absent."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from sm_train.errors import printable

_LATEST = "main"


def is_repo(path: str) -> bool:
    """Whether a model's path names a repository of a hub; else it is a folder."""
    return not Path(path).is_dir() and not path.startswith((".", "/", "~")) and path.count("/") == 1


def folder_of(path: str, revision: str | None = None) -> Path | None:
    """A model's local folder: its own, or the one in the hub's cache; None where there is none."""
    if Path(path).is_dir():
        return Path(path)
    if not is_repo(path):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, "config.json", revision=revision or _LATEST)
    return Path(found).parent if isinstance(found, str) else None


@dataclass(frozen=True, slots=True)
class Answer:
    """Whether a model can be had, in words."""

    is_had: bool
    text: str
    remedy: str = ""


def ask(path: str, revision: str | None, *, endpoint: str | None = None, timeout_s: float = 10.0) -> Answer:
    """Whether a model can be had from where this process would take it; nothing is fetched.

    Args:
        endpoint: of the hub; None for the one of the environment.
    """
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url

    copy = "copy it with python -m tools.fetch where there is internet, and give its folder"
    if folder := folder_of(path, revision):
        absent = missing_weights(folder)
        if not absent:
            return Answer(True, f"{path} is here, in {folder}")
        if Path(path).is_dir() or constants.HF_HUB_OFFLINE:
            return Answer(False, f"{folder} lacks {absent}", f"fetch it again, or {copy}")
    if not is_repo(path):
        return Answer(False, f"folder {path} does not exist", "mend the path, or give a hub repository as ORG/NAME")
    if constants.HF_HUB_OFFLINE:
        where = constants.HF_HUB_CACHE
        return Answer(False, f"{path} is not in {where}, and HF_HUB_OFFLINE is set", f"unset it, or {copy}")
    try:
        address = hf_hub_url(path, "config.json", revision=revision, endpoint=endpoint)
        found = get_hf_file_metadata(address, timeout=timeout_s, endpoint=endpoint)
    except errors.GatedRepoError:
        page = f"{endpoint or constants.ENDPOINT}/{path}"
        return Answer(False, f"{path} is gated", f"accept its licence at {page}, then hf auth login or set HF_TOKEN")
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        what = f"{path} at {revision}" if revision else path
        return Answer(False, f"the hub has no {what}, or it is private", "mend the name, or log in (hf auth login)")
    except Exception as error:  # of whatever carries its requests
        said = printable(" ".join(str(error).split()), 200)
        return Answer(False, f"the hub does not answer for {path} ({said})", f"mend the network, or {copy}")
    return Answer(True, f"{path} at {str(found.commit_hash)[:12]} can be had from the hub")


def settings() -> Answer:
    """How this process would come to models: offline or not, from which cache, with a token or not."""
    from huggingface_hub import constants, get_token

    cache, how = Path(constants.HF_HUB_CACHE), "offline" if constants.HF_HUB_OFFLINE else constants.ENDPOINT
    text = f"{how}, cache {cache}, {'a' if get_token() else 'no'} token"
    is_open = os.access(next(path for path in (cache, *cache.parents) if path.exists()), os.W_OK)
    if not is_open and not constants.HF_HUB_OFFLINE:
        return Answer(False, f"{text}; the cache cannot be written", "set HF_HOME to a folder that you may write")
    return Answer(True, text)


def missing_weights(folder: Path) -> str:
    """The first weight file that a checkpoint's folder should have and has not; empty where it is whole."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return "" if any(folder.glob("*.safetensors")) else "model.safetensors"
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        return "a readable model.safetensors.index.json"
    return next((name for name in names if not (folder / name).is_file()), "")
