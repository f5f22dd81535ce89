"""The export command: its words, a folder, a prompt as embeddings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sm_train import export, files
from sm_train.errors import UserError
from sm_train.exported import SpeechLlm
from tests.exporting import exported, model, recordings, run  # noqa: F401


def test_options_and_words_say_the_same(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    export.main([str(run), "--to", str(tmp_path / "a"), "--with-models"])
    export.main([str(run), f"to={tmp_path / 'b'}", "with_models=true", "max_new_tokens=150"])
    for name in ("config.json", "generation_config.json", "mapper/mapper.safetensors", "llm/model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert files.read_json(tmp_path / "a" / "config.json")["llm"]["path"] == "./llm"
    assert f'SpeechLlm.from_pretrained("{tmp_path / "a"}").generate(' in capsys.readouterr().out


def test_a_prompt_is_written_as_embeddings(
    run: Path, exported: Path, model: SpeechLlm, manifest: Path, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    recording = recordings(manifest)[0]
    wanted = model.prompt_embeds(recording, "What is said?")
    asked = ["--prompt-embeds", str(recording), "What is said?", "--to"]
    export.main([str(exported), *asked, str(tmp_path / "a.safetensors")])
    export.main([str(run), *asked, str(tmp_path / "b.pt"), "max_new_tokens=4"])
    assert torch.equal(load_file(tmp_path / "a.safetensors")["prompt_embeds"], wanted)
    assert torch.equal(torch.load(tmp_path / "b.pt", weights_only=True), wanted)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "no run is named"),
        (["to=x"], "no run is named"),
        (["RUN"], "required key 'to' is not set"),
        (["RUN", "--to"], "--to needs 1 more word"),
        (["RUN", "--onto", "x"], "option '--onto' is unknown"),
        (["RUN", "--to", "x", "trim=never"], "trim is 'never'"),
        (["RUN", "--to", "x", "dtype=int8"], "dtype is 'int8'"),
        (["RUN", "--to", "x", "colour=red"], "unknown key 'colour'"),
        (["/nowhere", "--to", "x"], "run /nowhere does not exist"),
        (["RUN", "--prompt-embeds", "a.wav", "--to", "x.pt"], "audio|suffix|needs"),
        (["RUN", "--prompt-embeds", "a.wav", "Say."], "--prompt-embeds needs --to"),
        (["RUN", "--prompt-embeds", "a.wav", "Say.", "--to", "x.bin"], "x.bin is no .safetensors or .pt"),
        (["EXPORTED", "--prompt-embeds", "a.wav", "Say.", "--to", "x.pt", "trim=none"], "is exported already"),
    ],
)
def test_a_mistake_is_one_line(
    run: Path, exported: Path, words: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    named = {"RUN": str(run), "EXPORTED": str(exported)}
    with pytest.raises(UserError, match=line) as caught:
        export.main([named.get(word, word) for word in words])
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
