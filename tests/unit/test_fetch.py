from __future__ import annotations

import errno
import hashlib
import json
import shlex
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import CompletedProcess
from urllib.parse import urlparse

import pytest

from sm_train import config
from sm_train.errors import UserError
from sm_train.evaluate import EvaluateConfig
from sm_train.precompute import PrecomputeConfig
from sm_train.tune import TuneConfig
from tests.builders import ROOT, run_module
from tools import fetch

COMMIT = "1" * 40
NEWER = "2" * 40
WEIGHTS = b"weights" * 10_000


def a_model() -> dict[str, bytes]:
    return {
        "config.json": b'{"model_type": "x"}', "model-00001-of-00001.safetensors": WEIGHTS, "tokenizer.model": b"t",
        "chat_template.jinja": b"{{ messages }}", "README.md": b"# no", "pytorch_model.bin": b"pickle",
        "original/params.json": b"{}",
    }  # fmt: skip


@dataclass
class Hub:
    """What a hub at an address has, and what it was asked for."""

    repos: dict[str, dict[str, bytes]]
    address: str = ""
    commit: str = COMMIT
    gated: set[str] = field(default_factory=set)
    served: dict[str, bytes] = field(default_factory=dict)
    """Files whose content on the wire is not what the hub says of them."""
    asked: list[str] = field(default_factory=list)


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = urlparse(self.path).path
            hub.asked.append(f"{self.command} {path}")
            words = path.strip("/").split("/")
            is_api = words[:2] == ["api", "models"]
            owner, name, *rest = words[2:] if is_api else words
            repo = f"{owner}/{name}"
            if repo not in hub.repos:
                return self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})
            if rest[:1] == ["revision"] and rest[1] not in ("main", hub.commit):
                return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            if is_api and rest[:1] != ["tree"]:
                return self.json({"id": repo, "sha": hub.commit, "siblings": []})
            if is_api:
                return self.json([listed(path, content) for path, content in hub.repos[repo].items()])
            if repo in hub.gated:
                return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
            file = "/".join(rest[2:])
            true = hub.repos[repo][file]
            etag = listed(file, true).get("lfs", {}).get("oid") or listed(file, true)["oid"]
            self.answer(200, hub.served.get(file, true), {"ETag": f'"{etag}"', "X-Repo-Commit": hub.commit})

        def json(self, value: object) -> None:
            self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            pass

    return Handler


def listed(path: str, content: bytes) -> dict[str, object]:
    """A file in the hub's tree; large ones are of LFS."""
    git = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(content), "oid": git}
    if path.endswith(".safetensors"):
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
    return entry


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub on this machine with an encoder and two LLMs of one name."""
    made = Hub(
        {"facebook/seamless": a_model(), "a/llm": a_model(), "b/llm": a_model(), "a/old": {"config.json": b"{}"}}
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(made))
    made.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield made
    server.shutdown()
    server.server_close()
    thread.join()


def run(hub: Hub, folder: Path, *argv: object, **env: str) -> CompletedProcess[str]:
    settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "",
                "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    done = run_module("tools.fetch", *argv, "--to", folder / "models", **settings | env)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_a_repository_is_copied_at_one_commit_and_not_twice(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "facebook/seamless")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "models/seamless"
    names = {"config.json", "model-00001-of-00001.safetensors", "tokenizer.model", "chat_template.jinja", "source.json"}
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == names
    assert (folder / "model-00001-of-00001.safetensors").read_bytes() == WEIGHTS
    source = json.loads((folder / "source.json").read_text())
    assert (source["repo"], source["commit"]) == ("facebook/seamless", COMMIT)
    assert source["files"]["config.json"]["bytes"] == 19
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["seamless"]
    hub.asked.clear()
    assert run(hub, tmp_path, "facebook/seamless", "--revision", COMMIT).returncode == 0
    assert not [path for path in hub.asked if "resolve" in path]
    hub.commit = NEWER
    done = run(hub, tmp_path, "facebook/seamless")
    assert done.returncode == 2
    assert "seamless holds facebook/seamless at 111111111111, not facebook/seamless at 222222222222" in done.stderr


def test_a_config_s_models_come_and_its_overrides_point_to_them(hub: Hub, tmp_path: Path) -> None:
    path = tmp_path / "precompute.yaml"
    path.write_text(
        "manifest: m\nout: o\nencoder: {path: facebook/seamless, layer: 24, revision: main}\ntargets:\n"
        '  - {name: one, llm: a/llm, pad_token: "<|finetune_right_pad_id|>", revision: main}\n'
        "  - {name: two, llm: b/llm}\n"
        f"  - {{name: here, llm: {tmp_path}}}\n"
    )
    done = run(hub, tmp_path, path)
    assert done.returncode == 0, done.stderr
    models = tmp_path / "models"
    assert sorted(folder.name for folder in models.iterdir()) == ["a--llm", "b--llm", "seamless"]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("offline: ")]
    words = shlex.split(line)[shlex.split(line).index(str(path)) :]
    cfg = config.load(PrecomputeConfig, words, "test")
    assert (cfg.encoder.path, cfg.encoder.revision, cfg.encoder.layer) == (str(models / "seamless"), None, 24)
    assert [(t.name, t.llm, t.revision, t.pad_token) for t in cfg.targets] == [
        ("one", str(models / "a--llm"), None, "<|finetune_right_pad_id|>"),
        ("two", str(models / "b--llm"), None, None),
        ("here", str(tmp_path), None, None),
    ]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["nobody/nothing"], "nobody/nothing does not exist at http"),
        (["facebook/seamless", "--revision", "v9"], "facebook/seamless has no such revision"),
        (["b/llm"], "b/llm is gated: accept its licence at http"),
        (["a/old"], "has no config.json with *.safetensors"),
        (["a/llm"], "model-00001-of-00001.safetensors came damaged"),
    ],
)
def test_what_cannot_be_had_is_one_line(hub: Hub, tmp_path: Path, argv: list[str], says: str) -> None:
    hub.gated = {"b/llm"}
    hub.served = {"model-00001-of-00001.safetensors": WEIGHTS[::-1]}
    done = run(hub, tmp_path, *argv)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert says in line
    assert not [path for path in (tmp_path / "models").glob("*") if not path.name.startswith(".")]


def test_a_copy_that_failed_goes_on_with_what_is_missing(hub: Hub, tmp_path: Path) -> None:
    hub.served = {"tokenizer.model": b"x"}
    assert "tokenizer.model came damaged" in run(hub, tmp_path, "a/llm").stderr
    hub.served = {}
    hub.asked.clear()
    done = run(hub, tmp_path, "a/llm")
    assert done.returncode == 0, done.stderr
    got = {path.rpartition("/")[2] for path in hub.asked if path.startswith("GET /a/llm/resolve")}
    assert got == {"tokenizer.model"}
    assert (tmp_path / "models/llm/tokenizer.model").read_bytes() == b"t"


def test_a_hub_that_cannot_be_reached_and_a_switched_off_one(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "a/llm", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 2
    assert "error: repository a/llm cannot be had from http://127.0.0.1:9" in done.stderr
    done = run(hub, tmp_path, "a/llm", HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert "error: HF_HUB_OFFLINE is set" in done.stderr


def test_a_full_disk_is_no_fault_of_the_hub() -> None:
    def raises(error: Exception) -> None:
        def ask() -> None:
            raise error

        fetch.asked_of_hub("a/llm", ask)

    with pytest.raises(OSError, match="No space left"):
        raises(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(UserError, match=r"cannot be had|HF_HUB_OFFLINE"):
        raises(OSError(errno.ENETUNREACH, "Network is unreachable"))


def test_a_folder_that_fetch_did_not_make_or_that_changed_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "llm").mkdir()
    with pytest.raises(UserError, match="was not put there by fetch"):
        fetch._is_there(tmp_path / "llm", "a/llm", COMMIT)
    source = {"repo": "a/llm", "commit": COMMIT, "files": {"config.json": {"bytes": 2}}}
    (tmp_path / "llm/source.json").write_text(json.dumps(source))
    with pytest.raises(UserError, match="not as it was fetched"):
        fetch._is_there(tmp_path / "llm", "a/llm", COMMIT)
    (tmp_path / "llm/config.json").write_text("{}")
    assert fetch._is_there(tmp_path / "llm", "a/llm", COMMIT)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["../x"], "neither a folder here nor a repository"),
        (["/etc"], "neither a folder here nor a repository"),
        (["a/.."], "neither a folder here nor a repository"),
        (["nowhere.yaml"], "does not exist"),
        (["configs/pretrain/llama31-8b.yaml"], "names no model"),
        (["configs/evaluate/llama31-8b.yaml", "--revision", "main"], "for one repository"),
    ],
)
def test_a_wrong_call_is_refused_before_the_hub_is_asked(tmp_path: Path, argv: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        fetch.main(
            [str(ROOT / argv[0]) if argv[0].startswith("configs") else argv[0], *argv[1:], "--to", str(tmp_path)]
        )


def test_every_shipped_config_s_models_are_found_and_their_overrides_load(tmp_path: Path) -> None:
    stages = {"precompute": PrecomputeConfig, "tune": TuneConfig, "evaluate": EvaluateConfig}
    found = {}
    for path in sorted((ROOT / "configs").glob("*/*.yaml")):
        if path.parent.name not in stages:
            continue
        mapping = config.read_yaml(path)
        wanted = fetch.wanted_by(mapping)
        found[f"{path.parent.name}/{path.stem}"] = [one.repo for one in wanted]
        words = fetch.overrides(mapping, {one.key: tmp_path for one in wanted})
        cfg = config.load(stages[path.parent.name], [str(path), *shlex.split(" ".join(words))], "test")
        assert [one.repo for one in fetch.wanted_by(config.to_mapping(cfg))] == [str(tmp_path)] * len(wanted)
    assert found["precompute/librispeech"] == [
        "facebook/seamless-m4t-v2-large", "meta-llama/Llama-3.1-8B-Instruct", "utter-project/EuroLLM-9B-Instruct"
    ]  # fmt: skip
    assert found["evaluate/llama31-8b"] == ["meta-llama/Llama-3.1-8B-Instruct"]
    mapping = {"llm": "a/llm", "llm_revision": "main"}
    assert fetch.overrides(mapping, {"llm": Path("/x")}) == ["llm=/x", "llm_revision=null"]
