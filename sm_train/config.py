"""Configs: defaults < YAML < dotted overrides; an unknown key is an error; frozen, hashed, dumped.

A config is a frozen dataclass beside the code it configures. Each field is declared with :func:`key`, whose help text
is what ``--help`` prints.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf, read_write
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from sm_train import files
from sm_train.errors import UserError

C = TypeVar("C")
REQUIRED: Any = MISSING


def key(default: Any, text: str) -> Any:
    """Declare a config field: its default (or :data:`REQUIRED`) and the line that ``--help`` prints."""
    if isinstance(default, list | dict) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: default, metadata={"help": text})
    return dataclasses.field(default=default, metadata={"help": text})


def load(schema: type[C], argv: list[str], program: str) -> C:
    """Build a frozen ``schema`` from ``CONFIG key=value ...``.

    Raises:
        UserError: the file is missing, a key is unknown, a value has the wrong type or a required one is absent.
    """
    usage = f"usage: python -m {program} CONFIG.yaml [key=value ...]"
    if any(word in ("-h", "--help") for word in argv):
        print(f"{usage}\n\nkeys:\n{describe(schema)}")
        raise SystemExit(0)
    if not argv or "=" in argv[0]:
        raise UserError(f"no config file given; {usage}")
    path = Path(argv[0])
    if not path.is_file():
        raise UserError(f"config file {path} does not exist; {usage}")
    return _build(schema, [_read(path), *(_override(word) for word in argv[1:])], where=str(path), words=argv[1:])


def _read(path: Path) -> DictConfig:
    try:
        values = OmegaConf.load(path)
    except (OmegaConfBaseException, YAMLError, ValueError, OSError) as error:
        raise UserError(f"config file {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, DictConfig):
        raise UserError(f"config file {path} holds no mapping of keys to values")
    return values


def _override(word: str) -> DictConfig:
    if not word.partition("=")[0] or "=" not in word:
        raise UserError(f"override {word!r} is not of the form key=value")
    name, _, value = word.partition("=")
    # 8:00:00 is no number of base 60, 12_3 not 123 and 0123 not 83, as YAML has it.
    if re.fullmatch(r"[-+]?\d+(:\d+)+|\d+(_\d+)+|0\d+", value):
        word = f"{name}='{value}'"
    try:
        return OmegaConf.from_dotlist([word])
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise UserError(f"override {word!r} cannot be read: {' '.join(str(error).split())}") from None


def from_mapping(schema: type[C], mapping: dict[str, Any], where: str) -> C:
    """Build a frozen ``schema`` from plain values, such as a run's own ``config.yaml``."""
    return _build(schema, [OmegaConf.create(mapping)], where=where)


def from_words(schema: type[C], words: list[str], where: str) -> C:
    """Build a frozen ``schema`` from ``key=value`` words alone."""
    return _build(schema, [_override(word) for word in words], where=where, words=words)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: the file is missing or holds no mapping.
    """
    if not path.is_file():
        raise UserError(f"file {path} does not exist")
    return typing.cast(dict[str, Any], OmegaConf.to_container(_read(path)))


def to_mapping(config: Any) -> dict[str, Any]:
    """The config as plain values, ready for JSON or YAML."""
    return dataclasses.asdict(config)


def fingerprint(config: Any) -> str:
    """A hash of every value of a config (or any JSON-able mapping): equal exactly when the values are."""
    values = to_mapping(config) if dataclasses.is_dataclass(config) else config
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def dump(config: Any, path: Path) -> None:
    """Write the resolved config as YAML, whole or not at all."""
    files.write_text(path, OmegaConf.to_yaml(OmegaConf.create(to_mapping(config))))


def describe(schema: Any, prefix: str = "", chosen: Any = None) -> str:
    """The lines of ``--help``: every key, its default and what it means.

    Args:
        chosen: the default that a config which holds this one gives it; None for the schema's own.
    """
    lines = []
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        hint = hints[field.name]
        made = field.default_factory
        default: Any = field.default if made is dataclasses.MISSING else made()
        default = default if chosen is None else getattr(chosen, field.name)
        if dataclasses.is_dataclass(hint):
            lines.append(describe(hint, f"{prefix}{field.name}.", default))
            continue
        shown = "required" if isinstance(default, str) and default == MISSING else f"default {json.dumps(default)}"
        lines.append(f"  {prefix}{field.name}  {field.metadata.get('help', '')} [{shown}]")
    return "\n".join(lines)


def _at_home(layer: Any) -> Any:
    """The layer with ``~/`` as a shell would have it: YAML, and key=value, leave it as it is."""

    def expanded(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: expanded(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [expanded(inner) for inner in value]
        return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value

    return OmegaConf.create(expanded(OmegaConf.to_container(layer)))


def _build(schema: type[C], layers: list[Any], where: str, words: Sequence[str] = ()) -> C:
    merged = OmegaConf.structured(schema)
    whole = [word.partition("=")[0] for word in words if word.partition("=")[2].lstrip().startswith("{")]
    hints = typing.get_type_hints(schema).items()
    mappings = {name for name, hint in hints if hint is Any or typing.get_origin(hint) is dict}
    try:
        for number, layer in enumerate(map(_at_home, layers)):
            # tasks={st: 1} is all the tasks there are; tasks.st=1 adds to what the file says.
            if number == len(layers) - len(words):
                with read_write(merged):
                    for mapping in mappings & set(whole):
                        merged[mapping] = {}
            merged = OmegaConf.merge(merged, layer)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            first = missing[0]
            raise UserError(f"{where}: required key {first!r} is not set; give it in the file or as {first}=...")
        return typing.cast(C, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        name, reason = getattr(error, "full_key", None), str(error).strip().splitlines()[0]
        if isinstance(error, ConfigKeyError):
            raise UserError(f"{where}: unknown key {name!r}; --help lists the keys") from None
        if "is not a ListConfig" in reason:
            reason = f"a list is wanted, as {name}=[A,B]"
        raise UserError(f"{where}: {f'key {name!r}: ' if name else ''}{reason}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None
