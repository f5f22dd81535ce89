"""docs/corpora.md: the importer in the page runs as it says, and the table names every format."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sm_train.data.manifest import read_instructions, read_manifest
from tests import corpora
from tests.builders import ROOT, child_env
from tools.corpora.__main__ import FORMATS, parser_of

PAGE = (ROOT / "docs/corpora.md").read_text(encoding="utf-8")


def test_the_page_s_importer_imports(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "my_corpus.py").write_text(code)
    source = tmp_path / "recordings"
    corpora.write_audio(source / "a.wav", np.tile(corpora.tiny(1)[0].samples_S, 3))
    turns = [
        {"who": "ann", "from": 0.0, "to": 0.75, "said": "the boat", "french": "le bateau"},
        {"who": "interviewer", "from": 0.75, "to": 1.0, "said": "which?"},
        {"who": "bob", "from": 1.0, "to": 1.5, "said": "the red one"},
        {"who": "bob", "from": 900.0, "to": 901.0, "said": "gone"},
    ]
    (source / "a.json").write_text(json.dumps({"lang": "en", "turns": turns}))
    (line,) = re.findall(r"    python (my_corpus\.py .*)", PAGE)
    done = subprocess.run(
        [sys.executable, *line.split()], cwd=tmp_path, env=child_env(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "left out: 1 speaker: a.json:2" in done.stdout
    assert "left out: 1 truncated: a.json:4" in done.stdout
    utterances = read_manifest(tmp_path / "data/dialogues/manifest.parquet")
    assert [(u.id, u.start_s, u.duration_s, u.text, u.speaker, u.split) for u in utterances] == [
        ("a-0001", 0.0, 0.75, "the boat", "ann", "train"), ("a-0003", 1.0, 0.5, "the red one", "bob", "train"),
    ]  # fmt: skip
    tasks = read_instructions(tmp_path / "data/dialogues/instructions.parquet")
    assert [(t.task, t.target_lang, t.answer) for t in tasks] == [
        ("asr", "en", "the boat"), ("st", "fr", "le bateau"), ("asr", "en", "the red one"),
    ]  # fmt: skip


def test_the_table_s_commands_are_ones_that_the_parser_takes() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*?\| `(.+?)` \|", PAGE, re.MULTILINE)
    assert [name for name, _ in rows] == list(FORMATS)
    for name, command in rows:
        assert parser_of(FORMATS).parse_args(command.split()).format == name


def test_every_format_says_what_it_is_and_where_its_layout_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    for name, importer in FORMATS.items():
        text = importer.__doc__ or ""
        assert re.search(r"Layouts?: https://", text), name
        assert len(text.partition("\n")[0]) <= 120
        with pytest.raises(SystemExit) as left:
            parser_of(FORMATS).parse_args([name, "--help"])
        assert left.value.code == 0
        assert "--speaker-from" in capsys.readouterr().out
