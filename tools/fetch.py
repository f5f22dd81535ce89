"""Copy the models that a config needs from the hub, for machines without internet.

    python -m tools.fetch CONFIG_OR_REPO [--revision R] --to DIR

Run where there is internet. CONFIG is a stage's YAML file (its encoder, its targets' LLMs, its llm), REPO a repository
as facebook/seamless-m4t-v2-large. Each goes whole to DIR/NAME at one commit, its files checked against the hub's
hashes, with a source.json that says where it is from; what to add to the stage's command line is printed. An
interrupted copy goes on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shlex
import shutil
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sm_train import config, files
from sm_train.errors import UserError, run_command

SOURCE = "source.json"
PATTERNS = ("*.json", "*.safetensors", "*.model", "*.jinja")
"""What checkpoints are read from; only of a repository's top folder."""
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model that a config names."""

    key: str
    """Where: ``encoder.path``, ``targets.0.llm``, ``llm.path`` or ``llm``; empty for a repository by name."""
    repo: str
    revision: str | None


def wanted_by(mapping: dict[str, Any]) -> list[Wanted]:
    """The models a stage's config names, folders too, in the order of its keys."""
    found = []
    for key in ("encoder", "llm"):
        value = mapping.get(key)
        if isinstance(value, dict) and value.get("path"):
            found.append(Wanted(f"{key}.path", str(value["path"]), value.get("revision")))
        elif key == "llm" and isinstance(value, str):
            found.append(Wanted(key, value, mapping.get("llm_revision")))
    for i, target in enumerate(mapping.get("targets") or []):
        found.append(Wanted(f"targets.{i}.llm", str(target["llm"]), target.get("revision")))
    return found


def overrides(mapping: dict[str, Any], places: dict[str, Path]) -> list[str]:
    """What to add to a stage's command line so that it reads the copies: key -> folder, as words of a shell."""
    words = [f"{key}={place}" for key, place in places.items() if not key.startswith("targets.")]
    for key, revision in (("encoder.path", "encoder.revision"), ("llm.path", "llm.revision"), ("llm", "llm_revision")):
        section, _, name = revision.rpartition(".")
        if key in places and (mapping[section] if section else mapping).get(name):
            words.append(f"{revision}=null")
    targets = [dict(target) for target in mapping.get("targets") or []]
    for i, target in enumerate(targets):
        if f"targets.{i}.llm" in places:
            target["llm"] = str(places[f"targets.{i}.llm"])
            target.pop("revision", None)
    if any(key.startswith("targets.") for key in places):
        words.append(f"targets={json.dumps(targets, ensure_ascii=False)}")
    return [shlex.quote(word) for word in words]


def fetch(repo: str, revision: str | None, folder: Path) -> str:
    """Copy a repository's model files to a folder, whole or not at all; returns the commit.

    Raises:
        UserError: the repository cannot be had, or the folder holds something else.
    """
    from huggingface_hub import HfApi, snapshot_download

    api = HfApi()
    commit = str(asked_of_hub(repo, lambda: api.model_info(repo, revision=revision)).sha)
    if _is_there(folder, repo, commit):
        return commit
    aside = folder.with_name(f"{files.ASIDE}{folder.name}-{commit[:12]}")

    def download() -> dict[str, Any]:
        tree = list(api.list_repo_tree(repo, revision=commit))
        snapshot_download(repo, revision=commit, local_dir=aside, allow_patterns=list(PATTERNS), ignore_patterns="*/*")
        return {entry.path: entry for entry in tree if (aside / entry.path).is_file()}

    there = asked_of_hub(repo, download)
    if "config.json" not in there or not any(name.endswith(".safetensors") for name in there):
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"repository {repo} at {commit[:12]} has no config.json with *.safetensors; nothing else is read"
        )
    hashes = {name: _checked(aside / name, entry) for name, entry in sorted(there.items())}
    shutil.rmtree(aside / ".cache", ignore_errors=True)
    files.write_json(aside / SOURCE, {"repo": repo, "commit": commit, "files": hashes})
    files.publish_folder(aside, folder, SOURCE)
    return commit


def asked_of_hub(repo: str, ask: Callable[[], T]) -> T:
    """What the hub answers; every way it can refuse becomes one line."""
    from huggingface_hub import constants, errors

    try:
        return ask()
    except errors.GatedRepoError:
        page = f"{constants.ENDPOINT}/{repo}"
        raise UserError(
            f"repository {repo} is gated: accept its licence at {page}, then log in (hf auth login) or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"repository {repo} has no such revision; give a branch, a tag or a commit of it") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"repository {repo} does not exist at {constants.ENDPOINT}, or is private; mend the name, or set HF_TOKEN"
        ) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
            raise
        if constants.HF_HUB_OFFLINE:
            raise UserError("HF_HUB_OFFLINE is set; fetch where there is internet, with HF_HUB_OFFLINE=0") from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"repository {repo} cannot be had from {constants.ENDPOINT}: {reason}; try again") from None


def _is_there(folder: Path, repo: str, commit: str) -> bool:
    if not folder.exists():
        return False
    if not (folder / SOURCE).is_file():
        raise UserError(f"{folder} exists, but was not put there by fetch; give another --to, or remove it")
    source = files.read_json(folder / SOURCE)
    if (source["repo"], source["commit"]) != (repo, commit):
        held = f"{source['repo']} at {source['commit'][:12]}"
        raise UserError(
            f"{folder} holds {held}, not {repo} at {commit[:12]}; give --revision or another --to, or remove it"
        )
    for name, fact in source["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != fact["bytes"]:
            raise UserError(f"{path} is not as it was fetched; remove {folder} and fetch it again")
    return True


def _checked(path: Path, entry: Any) -> dict[str, Any]:
    """The size and sha256 of a file, once they, or git's hash of a small one, are what the hub says.

    Raises:
        UserError: they are not.
    """
    size = path.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            sha256.update(block)
            if entry.lfs is None:
                git.update(block)
    ours, theirs = (git.hexdigest(), entry.blob_id) if entry.lfs is None else (sha256.hexdigest(), entry.lfs.sha256)
    if ours != theirs or size != entry.size:
        path.unlink()
        raise UserError(
            f"{path.name} came damaged: its hash is {ours[:12]}, the hub's is {theirs[:12]}; run fetch again"
        )
    return {"bytes": size, "sha256": sha256.hexdigest()}


def _folders(wanted: list[Wanted], to: Path) -> dict[str, Path]:
    """Repository -> its folder: the name, or with its owner's where two have the same name."""
    repos = list(dict.fromkeys(one.repo for one in wanted))
    names = [repo.rpartition("/")[2] for repo in repos]
    return {
        repo: to / (name if names.count(name) == 1 else repo.replace("/", "--"))
        for repo, name in zip(repos, names, strict=True)
    }


def main(argv: list[str]) -> None:
    parser = ArgumentParser("python -m tools.fetch", description=__doc__.splitlines()[0])
    parser.add_argument("what", metavar="CONFIG_OR_REPO", help="a stage's YAML file, or a repository as OWNER/NAME")
    parser.add_argument("--revision", help="branch, tag or commit of a REPO; a config has its own revision keys")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="each model goes to DIR/NAME")
    asked = parser.parse_args(argv)
    is_config = asked.what.endswith((".yaml", ".yml")) or Path(asked.what).is_file()
    mapping = config.read_yaml(Path(asked.what)) if is_config else {}
    if is_config and asked.revision:
        raise UserError("--revision is for one repository; pin a config's models by its own revision keys")
    named = wanted_by(mapping) if is_config else [Wanted("", asked.what, asked.revision)]
    wanted = [one for one in named if not (is_config and Path(one.repo).is_dir())]
    for one in wanted:
        if not _REPO.fullmatch(one.repo):
            raise UserError(f"{one.key or 'model'} {one.repo!r} is neither a folder here nor a repository OWNER/NAME")
    if not named:
        raise UserError(f"config {asked.what} names no model (encoder.path, targets, llm); give one that does")
    revisions = {one.repo: one.revision for one in wanted}
    if clash := [one.repo for one in wanted if revisions[one.repo] != one.revision]:
        raise UserError(
            f"config {asked.what} names {clash[0]} in two revisions; fetch each by name, to a folder of its own"
        )
    places: dict[str, Path] = {}
    for repo, folder in _folders(wanted, asked.to).items():
        commit = fetch(repo, revisions[repo], folder)
        print(f"{folder}: {repo} at {commit}", flush=True)
        places |= {one.key: Path(os.path.abspath(folder)) for one in wanted if one.repo == repo and one.key}
    if places:
        print(f"offline: HF_HUB_OFFLINE=1 ... {asked.what} {' '.join(overrides(mapping, places))}", flush=True)
    elif is_config:
        print(f"{asked.what}: every model is a folder already", flush=True)


if __name__ == "__main__":
    run_command(main)
