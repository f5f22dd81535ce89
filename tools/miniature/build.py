"""Make the miniature's checkpoints, once: ``python -m tools.miniature.build [CONFIG key=value ...]``.

A part whose build.json names the same config is not made again. results.json and CARD.md are written from all.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sm_train.config import fingerprint, from_mapping, key, load, to_mapping
from sm_train.errors import run_command
from sm_train.files import write_text
from tools.miniature.build_encoder import build_encoder
from tools.miniature.build_llm import build_llm
from tools.miniature.build_ssl import SslConfig, build_ssl
from tools.miniature.chat import Prompts
from tools.miniature.lessons import LlmConfig
from tools.miniature.training import Row
from tools.miniature.utterances import EncoderConfig
from tools.miniature.world import World, WorldConfig

DEFAULT_CONFIG = "configs/miniature/build.yaml"


@dataclass(frozen=True)
class BuildConfig:
    """The checkpoints and where they go."""

    output: str = key("tools/miniature/weights", "folder of the checkpoints, results.json and CARD.md")
    cache: str = key("", "folder of synthesised features; empty: one under the system's temporary folder")
    prompts: str = key("configs/prompts/miniature.yaml", "the prompts the LLM is trained on, and the held-out ones")
    card: str = key("tools/miniature/card.md", "text of CARD.md; the measured tables take the place of {tables}")
    seed: int = key(17, "every random choice follows from it")
    threads: int = key(1, "torch threads; weights are the same bytes only for the same number")
    parts: list[str] = key(["llm", "encoder"], "what to make: llm, encoder, ssl")
    world: WorldConfig = key(WorldConfig(), "the language")
    llm: LlmConfig = key(LlmConfig(), "the LLM")
    encoder: EncoderConfig = key(EncoderConfig(), "the speech encoder")
    ssl: SslConfig = key(SslConfig(), "the self-supervised speech encoder")


def main(argv: list[str]) -> None:
    """Make what is missing, then the card."""
    config = load(BuildConfig, argv or [DEFAULT_CONFIG], "tools.miniature.build")
    torch.set_num_threads(config.threads)
    output = Path(config.output)
    cache = Path(config.cache or Path(tempfile.gettempdir()) / "sm_train_miniature")
    world = World(config.world)
    makers: dict[str, Callable[[Path], list[Row]]] = {
        "llm": lambda folder: build_llm(config.llm, world, Prompts(Path(config.prompts)), folder, cache, config.seed),
        "encoder": lambda folder: build_encoder(config.encoder, world, folder, cache, config.seed),
        "ssl": lambda folder: build_ssl(config.ssl, world, folder, cache, config.seed),
    }
    for part in config.parts:
        _make(config, part, output / part, makers[part])
    built = [output / part / "build.json" for part in makers]
    rows = [row for path in built if path.is_file() for row in json.loads(path.read_text(encoding="utf-8"))["results"]]
    write_text(output / "results.json", json.dumps(rows, indent=1) + "\n")
    card = Path(config.card).read_text(encoding="utf-8")
    write_text(output / "CARD.md", card.replace("{tables}", _tables(rows)))


def _make(config: BuildConfig, part: str, folder: Path, make: Callable[[Path], list[Row]]) -> None:
    """Make one part unless its build.json says that it is there; build.json is written last."""
    values = to_mapping(config)
    asked = {name: values[name] for name in ("seed", "threads", "world", part)}
    done = folder / "build.json"
    if done.is_file() and is_same(json.loads(done.read_text(encoding="utf-8"))["config"], asked):
        print(f"{part}: already made, in {folder}", flush=True)
        return
    done.unlink(missing_ok=True)
    rows = make(folder)
    for path in folder.iterdir():
        path.chmod(0o644)
    write_text(done, json.dumps({"fingerprint": fingerprint(asked), "config": asked, "results": rows}, indent=1) + "\n")


def is_same(recorded: dict[str, Any], asked: dict[str, Any]) -> bool:
    """Whether a build was of this config; a key that came later counts as its default."""
    today = to_mapping(from_mapping(BuildConfig, recorded, "build.json"))
    return fingerprint({name: today[name] for name in asked}) == fingerprint(asked)


def _tables(rows: list[Row]) -> str:
    """Two tables in Markdown: scores, and what the making took."""
    scores = ["| system | task | metric | value | 95% interval | sentences |", "|---|---|---|---|---|---|"]
    making = ["| | | |", "|---|---|---|"]
    for row in rows:
        if row["metric"] == "chrf":
            scores.append(f"| {row['system']} | {row['task']} | chrF | {row['value']:.1f} | | {row['count']} |")
        elif row["metric"] in ("exact_match", "wer", "cer"):
            interval = f"{row['low']:.1%} to {row['high']:.1%}"
            cells = [row["system"], row["task"], row["metric"], f"{row['value']:.1%}", interval, row["count"]]
            scores.append("| " + " | ".join(str(cell) for cell in cells) + " |")
        else:
            making.append(f"| {row['system']} | {row['task']}, {row['metric']} | {row['value']:,.4g} |")
    return "\n".join([*scores, "", *making])


if __name__ == "__main__":
    run_command(main)
