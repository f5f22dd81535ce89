"""A loaded export: one recording or many, files or samples, texts or embeddings, all the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sm_train import files
from sm_train.errors import UserError
from sm_train.exported import SpeechLlm, SpeechLlmConfig
from tests.exporting import exported, model, recordings, run  # noqa: F401

PROMPTS = ("What is said?", "Say this.\n{speech}\nIn other words, please.", "In French.\n{speech}")


@pytest.fixture(scope="module")
def pairs(manifest: Path) -> list[tuple[Path, str]]:
    """16 recordings of 1 to 3 s, under prompts of different lengths."""
    return [(path, PROMPTS[i % 3]) for i, path in enumerate(recordings(manifest)[:16])]


def logits(model: SpeechLlm, prompts: list[Tensor]) -> Tensor:  # noqa: F811
    """What the LLM's greedy decoding of a left-padded batch chooses its first four tokens from [B, 4, V]."""
    embeds_BLD, mask_BL = model._frozen.pad(prompts)
    said = model.llm.generate(
        inputs_embeds=embeds_BLD, attention_mask=mask_BL, min_new_tokens=4, max_new_tokens=4, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return torch.stack(said.logits, dim=1)


def test_a_batch_of_16_says_what_each_says_alone(model: SpeechLlm, pairs: list[tuple[Path, str]]) -> None:  # noqa: F811
    alone = [model.generate(audio, prompt) for audio, prompt in pairs]
    assert model.generate(pairs) == alone
    assert len(set(alone)) > 1  # an untrained LLM does not say much; the logits below tell more
    prompts = [model.prompt_embeds(audio, prompt) for audio, prompt in pairs]
    assert len({len(prompt) for prompt in prompts}) > 8  # most of the rows are padded
    of_one = torch.cat([logits(model, [prompt]) for prompt in prompts])
    torch.testing.assert_close(logits(model, prompts), of_one, atol=1e-5, rtol=1e-5)
    assert model.generate([]) == []


def test_samples_are_heard_as_their_file_is(model: SpeechLlm, manifest: Path, tmp_path: Path) -> None:  # noqa: F811
    path = recordings(manifest)[0]
    samples_S, rate_hz = soundfile.read(path, dtype="float32")
    wanted = model.prompt_embeds(path, PROMPTS[0])
    assert torch.equal(model.prompt_embeds(samples_S, PROMPTS[0], sampling_rate=rate_hz), wanted)
    both = np.stack([samples_S, samples_S], axis=1).astype(np.float64)
    assert torch.equal(model.prompt_embeds(both, PROMPTS[0], sampling_rate=rate_hz), wanted)
    fine = np.repeat(samples_S, 2)
    soundfile.write(tmp_path / "fine.wav", fine, 2 * rate_hz, subtype="FLOAT")
    of_file = model.prompt_embeds(str(tmp_path / "fine.wav"), PROMPTS[0])
    assert torch.equal(model.prompt_embeds(fine, PROMPTS[0], sampling_rate=2 * rate_hz), of_file)
    assert model.generate(samples_S, PROMPTS[0], sampling_rate=rate_hz) == model.generate(str(path), PROMPTS[0])


def test_prompt_embeddings_say_the_same_to_the_llm_alone(
    model: SpeechLlm, pairs: list[tuple[Path, str]], llm_folder: Path  # noqa: F811
) -> None:  # fmt: skip
    llm, tokenizer = AutoModelForCausalLM.from_pretrained(llm_folder), AutoTokenizer.from_pretrained(llm_folder)
    ends = model.generation_config.eos_token_id
    for audio, prompt in pairs[:4]:
        embeds_LD = model.prompt_embeds(audio, prompt)
        assert embeds_LD.shape[1] == llm.config.hidden_size
        (ids,) = llm.generate(inputs_embeds=embeds_LD[None], do_sample=False, max_new_tokens=8, eos_token_id=ends)
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == model.generate(audio, prompt)
        with torch.inference_mode():
            torch.testing.assert_close(model(embeds_LD[None]).logits, llm(inputs_embeds=embeds_LD[None]).logits)


def test_transformers_finds_it(model: SpeechLlm, exported: Path, pairs: list[tuple[Path, str]]) -> None:  # noqa: F811
    found = AutoModel.from_pretrained(exported)
    assert isinstance(found, PreTrainedModel)
    assert type(found) is SpeechLlm
    assert found.generate(pairs[:2]) == model.generate(pairs[:2])
    assert type(AutoConfig.from_pretrained(exported)) is SpeechLlmConfig
    assert not any(parameter.requires_grad for parameter in found.llm.parameters())
    assert not found.mapper.training


def test_the_llm_runs_in_the_precision_that_is_asked_for(exported: Path) -> None:  # noqa: F811
    for asked in (torch.bfloat16, "bfloat16"):
        loaded = SpeechLlm.from_pretrained(exported, dtype=asked, device="cpu")
        assert {p.dtype for p in loaded.llm.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in loaded.mapper.parameters()} == {torch.float32}
    with pytest.raises(UserError, match="dtype is 'int8'; it must be one of float32"):
        SpeechLlm.from_pretrained(exported, dtype="int8")


def test_another_llm_than_the_exported_one_is_refused(
    exported: Path, llm_folder: Path, encoder_folder: Path, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    other = Path(shutil.copytree(llm_folder, tmp_path / "llm"))
    settings = files.read_json(other / "config.json")
    files.write_json(other / "config.json", {**settings, "rms_norm_eps": 1e-3})
    with pytest.raises(UserError, match=r"LLM .*: hash is '.*name the folder .* as llm=\.\.\."):
        SpeechLlm.from_pretrained(exported, llm=str(other), device="cpu")
    encoder = Path(shutil.copytree(encoder_folder, tmp_path / "encoder"))
    settings = files.read_json(encoder / "config.json")
    files.write_json(encoder / "config.json", {**settings, "layer_norm_eps": 1e-3})
    with pytest.raises(UserError, match=r"settings_hash is '.*as speech_encoder=\.\.\."):
        SpeechLlm.from_pretrained(exported, speech_encoder=str(encoder), device="cpu")


def test_mistakes_are_named(model: SpeechLlm, manifest: Path, tmp_path: Path) -> None:  # noqa: F811
    path, noise = recordings(manifest)[0], np.zeros(16_000, np.float32)
    mistakes: list[tuple[object, str | None, str]] = [
        (path, None, "the prompt is None"),
        ([path], "Say.", r"takes \(audio, prompt\), or one list"),
        ([path], None, r"one list of \(audio, prompt\) pairs"),
        (path, "{speech} and {speech}", "2 {speech} placeholders"),
        (noise, "Say.", "sampling_rate is None"),
        (tmp_path / "nowhere.wav", "Say.", "missing_audio"),
    ]
    for audio, prompt, line in mistakes:
        with pytest.raises(UserError, match=line):
            model.generate(audio, prompt)  # type: ignore[call-overload]
    with pytest.raises(UserError, match="max_new_tokens is 0"):
        model.generate(path, "Say.", max_new_tokens=0)
    with pytest.raises(UserError, match="is too short"):
        model.generate(noise[:50], "Say.", sampling_rate=16_000)
    for move in (model.half, lambda: model.to("cpu")):
        with pytest.raises(UserError, match="stays where it is"):
            move()
    with pytest.raises(UserError, match="copy it instead"):
        model.save_pretrained(tmp_path)
