"""Going on from another checkpoint of the miniature's LLM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sm_train.errors import UserError
from tools.miniature.warm import start_from


def tokenizer_of(words: list[str]) -> PreTrainedTokenizerFast:
    vocabulary = {word: row for row, word in enumerate(words)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token=words[0])))


def model_of(words: list[str], width: int = 8) -> LlamaForCausalLM:
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(words), tie_word_embeddings=False, **sizes))


def test_known_tokens_keep_their_rows_and_layers_are_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    few = [f"w{number}" for number in range(20)]
    many = ["new", *reversed(few), "newer"]
    old, new = model_of(few), model_of(many)
    old.save_pretrained(tmp_path)
    tokenizer_of(few).save_pretrained(tmp_path)
    assert start_from(new, tokenizer_of(many), tmp_path) == len(few)
    known, state = old.state_dict(), new.state_dict()
    for name, tensor in known.items():
        if "embed_tokens" in name or "lm_head" in name:
            assert torch.equal(state[name][1:-1].flip(0), tensor)
            assert not (state[name][[0, -1]] == 0).any()
        else:
            assert torch.equal(state[name], tensor)


def test_another_shape_is_refused(tmp_path: Path) -> None:
    words = ["a", "b", "c"]
    model_of(words).save_pretrained(tmp_path)
    tokenizer_of(words).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"start_from: .* has another shape at"):
        start_from(model_of(words, width=16), tokenizer_of(words), tmp_path)
