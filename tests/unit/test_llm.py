"""The frozen LLM: what it generates from embeddings is what it generates from ids."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from sm_train.data.target_set import TargetSet
from sm_train.errors import UserError
from sm_train.models.embedding import require_embeddings
from sm_train.models.llm import FrozenLlm, LlmConfig, load_model
from tests import builders


@pytest.fixture(scope="module")
def llm(llm_folder: Path) -> FrozenLlm:
    return FrozenLlm(LlmConfig(str(llm_folder), device="cpu"))


def test_embed_is_the_models_own_embedding(llm: FrozenLlm) -> None:
    ids = [5, 3, 9]
    assert torch.equal(llm.embed(ids), llm.model.get_input_embeddings()(torch.tensor(ids)))


def test_answers_equal_generation_from_ids(llm: FrozenLlm) -> None:
    ids = [5, 3, 9, 12]
    with torch.inference_mode():
        whole = llm.model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, 4).long(),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
        )
    expected = llm.tokenizer.decode(whole[0, 4:], skip_special_tokens=True).strip()
    assert llm.answer([llm.embed(ids)], 12) == [expected]


def test_a_prompt_is_answered_the_same_alone_and_beside_longer_ones(llm: FrozenLlm) -> None:
    prompts = [llm.embed(ids) for ids in ([4, 5], [100, 200, 3], [50] * 15)]
    together = llm.answer(prompts, 10)
    assert together == [llm.answer([prompt], 10)[0] for prompt in prompts]
    assert len(set(together)) > 1


def test_tokens_are_counted_up_to_each_answers_end(llm: FrozenLlm, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [llm.embed(ids) for ids in ([4, 5], [100, 200, 3], [50] * 15)]

    def free(prompt: torch.Tensor) -> list[int]:
        mask = torch.ones(1, len(prompt)).long()
        ids: list[int] = llm.model.generate(inputs_embeds=prompt[None], attention_mask=mask, max_new_tokens=10)[
            0
        ].tolist()
        return ids

    said = [free(prompt) for prompt in prompts]
    end = said[0][3]
    monkeypatch.setattr(llm, "end_ids", [end])
    monkeypatch.setattr(llm.model.generation_config, "eos_token_id", [end])
    read, written = llm.tokens_read, llm.tokens_written
    llm.answer(prompts, 10)
    assert llm.tokens_read - read == 2 + 3 + 15
    counts = [ids.index(end) + 1 if end in ids else len(ids) for ids in said]
    assert llm.tokens_written - written == sum(counts) < sum(map(len, said))


def test_a_missing_folder_is_one_line() -> None:
    with pytest.raises(UserError, match=r"LLM \./nowhere: the folder does not exist"):
        FrozenLlm(LlmConfig("./nowhere"))


def test_targets_of_another_embedding_are_refused(llm_folder: Path, shard_set: Path) -> None:
    targets = TargetSet(shard_set, "tiny")
    require_embeddings(llm_folder, targets)
    targets.rows_RD = targets.rows_RD.flip(0)
    with pytest.raises(UserError, match="does not embed tokens as target set"):
        require_embeddings(llm_folder, targets)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_model_is_frozen_and_in_evaluation_mode(llm_folder: Path, dtype: str) -> None:
    model = load_model(str(llm_folder), None, dtype)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_an_llm_without_weights_is_one_line(llm_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"LLM {tmp_path}: the folder has no config.json"):
        load_model(str(tmp_path), None, "float32")
    shutil.copytree(llm_folder, tmp_path, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    with pytest.raises(UserError, match=f"LLM {tmp_path} cannot be loaded: ") as caught:
        load_model(str(tmp_path), None, "float32")
    assert "\n" not in str(caught.value)


def test_a_repository_is_not_asked_for_offline(tmp_path: Path) -> None:
    """The commands that name models say in one line how to get them; before anything is encoded or trained."""
    said = r"HF_HUB_OFFLINE is set; fetch it with python -m tools\.fetch CONFIG --to DIR on a machine with internet"
    with pytest.raises(UserError, match=f"LLM nobody/llm: neither a folder here nor in the hub's cache, and {said}"):
        FrozenLlm(LlmConfig("nobody/llm"))
    words = [f"out={tmp_path / 'set'}", "targets=[{name: t, llm: nobody/llm}]"]
    done = builders.run_module("sm_train.precompute", offline(tmp_path), *words, HF_HOME=str(tmp_path))
    assert done.returncode == 2
    assert re.fullmatch(f"error: LLM nobody/llm: .*{said}.*\n", done.stderr)
    assert not list((tmp_path / "set").glob("*"))


def offline(folder: Path) -> Path:
    builders.write_manifest(folder / "m.jsonl", [builders.row("a", "a.flac", 1.0, "a")])
    path = folder / "cfg.yaml"
    path.write_text(f"manifest: {folder / 'm.jsonl'}\nencoder: {{path: nobody/encoder}}\n")
    return path
