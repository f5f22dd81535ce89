from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest

from sm_train import config
from sm_train.errors import UserError


@dataclass(frozen=True)
class Inner:
    width: int = config.key(4, "how wide")

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"inner.width is {self.width}; it must be 1 or more")


@dataclass(frozen=True)
class Outer:
    path: str = config.key(config.REQUIRED, "where")
    inner: Inner = config.key(Inner(), "the inner part")
    parts: list[Inner] = config.key([], "a list")
    rate: float = config.key(0.5, "how fast")
    pinned: str | None = config.key(None, "a revision")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text("path: here\ninner: {width: 5}\n")
    return path


def load(file: Path, *overrides: str) -> Outer:
    return config.load(Outer, [str(file), *overrides], "program")


def test_defaults_then_file_then_overrides(file: Path) -> None:
    cfg = load(file, "inner.width=7", "rate=1e2", "parts=[{width: 2}, {}]", "pinned=abc")
    assert cfg == Outer("here", Inner(7), [Inner(2), Inner(4)], 100.0, "abc")
    assert load(file).inner == Inner(5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.rate = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "overrides", "says"),
    [
        ("path: x", ["inner.wide=1"], "unknown key 'inner.wide'"),
        ("path: x\nother: 1", [], "unknown key 'other'"),
        ("rate: 1.0", [], "required key 'path' is not set"),
        ("path: x", ["rate=fast"], "key 'rate'"),
        ("path: x", ["inner.width=2.5"], "key 'inner.width'"),
        ("path: x", ["inner=3"], "Inner"),
        ("path: x", ["inner.width=0"], "inner.width is 0; it must be 1 or more"),
        ("path: x", ["rate"], "'rate' is not of the form key=value"),
        ("path: x", ["=1"], "not of the form key=value"),
        ("path: x", ["rate=[1"], "override 'rate=\\[1' cannot be read"),
        ("path: x", ["parts.0.width=1"], "Cannot merge"),
        ("path: x", ["rate=${oc.env:NOT_THERE}"], "NOT_THERE"),
        ("path: x\npath: y", [], "duplicate key"),
        ("path: [1", [], "is not YAML"),
        ("- 1", [], "no mapping"),
    ],
)
def test_every_mistake_is_one_line_that_names_it(tmp_path: Path, text: str, overrides: list[str], says: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=says) as error:
        load(path, *overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["8:00:00", "12:13", "1-12:00:00", "30", "12_3", "0123"])
def test_a_time_stays_as_it_was_written(file: Path, value: str) -> None:
    assert load(file, f"path={value}").path == value


def test_a_missing_file_and_no_file_say_how_to_call() -> None:
    for argv in (["/not/there.yaml"], [], ["rate=1"]):
        with pytest.raises(UserError, match="usage: python -m program"):
            config.load(Outer, argv, "program")


def test_help_names_every_key_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        config.load(Outer, ["--help"], "program")
    text = capsys.readouterr().out
    assert "path  where [required]" in text
    assert "inner.width  how wide [default 4]" in text
    assert "pinned  a revision [default null]" in text


def test_a_dumped_config_loads_to_the_same_and_hashes_to_the_same(file: Path, tmp_path: Path) -> None:
    cfg = load(file, "parts=[{width: 2}]")
    config.dump(cfg, tmp_path / "dumped.yaml")
    again = load(tmp_path / "dumped.yaml")
    assert again == cfg
    assert config.from_mapping(Outer, config.read_yaml(tmp_path / "dumped.yaml"), "there") == cfg
    assert config.fingerprint(again) == config.fingerprint(cfg) == config.fingerprint(config.to_mapping(cfg))
    assert config.fingerprint(load(file)) != config.fingerprint(cfg)


def test_read_yaml_refuses_what_is_no_mapping(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        config.read_yaml(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="no mapping"):
        config.read_yaml(tmp_path / "list.yaml")


@dataclass(frozen=True)
class Shares:
    shares: dict[str, float] = config.key(config.REQUIRED, "what of what")
    names: list[str] = config.key([], "some")


def test_a_mapping_given_whole_takes_the_place_of_the_file_s(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("shares: {a: 1}")
    for words, expected in (
        ([], {"a": 1.0}),
        (["shares={b: 2}"], {"b": 2.0}),
        (["shares.b=2"], {"a": 1.0, "b": 2.0}),
        (["shares={b: 2}", "shares.c=3"], {"b": 2.0, "c": 3.0}),
    ):
        assert config.load(Shares, [str(path), *words], "test").shares == expected
    with pytest.raises(UserError, match=r"key 'names': a list is wanted, as names=\[A,B\]"):
        config.load(Shares, [str(path), "names=a"], "test")


@dataclass(frozen=True)
class Holder:
    shares: Shares = config.key(Shares(shares={"z": 9.0}), "another default than its own")


def test_help_shows_the_default_that_holds() -> None:
    assert 'shares.shares  what of what [default {"z": 9.0}]' in config.describe(Holder)
