"""The shipped checkpoints of the miniature: formats, seams, sizes, and that they still answer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoFeatureExtractor, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from tools.miniature.build_encoder import PREFIX, load_encoder, pooled
from tools.miniature.build_llm import generate
from tools.miniature.chat import Prompts, chat_pieces, examples_of
from tools.miniature.ctc import CtcBatch, CtcHead, pool_pairs, word_error_rate
from tools.miniature.speech import TRAIN_VOICES, utter
from tools.miniature.world import Sentence, World, WorldConfig

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "tools/miniature/weights"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(WEIGHTS / "llm")


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return Prompts(ROOT / "configs/prompts/miniature.yaml")


@pytest.fixture(scope="module")
def sentences() -> list[Sentence]:
    world, rng = World(WorldConfig()), np.random.default_rng(5)
    return [world.sample(rng, "test") for _ in range(20)]


def test_transcript_has_the_same_tokens_alone_and_in_every_prompt(
    tokenizer: PreTrainedTokenizerFast, prompts: Prompts, sentences: list[Sentence]
) -> None:
    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    for task in prompts.tasks:
        for prompt in prompts.of(task, "train") + prompts.of(task, "held_out"):
            assert prompt.count("{speech}") == 1
            assert "{speech}" in prompt.split("\n")
            for sentence in sentences:
                example = examples_of(sentence, task, prompt, 0)
                prefix, suffix = chat_pieces(tokenizer, example.prompt)
                whole = prefix + sentence.text + suffix
                assert ids(prefix) + ids(sentence.text) + ids(suffix) == ids(whole), example


def test_chat_template_is_the_documented_string(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == "<bos><|user|>\nhello<|end|>\n<|assistant|>\nworld<|end|>"
    opened = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert opened == "<bos><|user|>\nhello<|end|>\n<|assistant|>\n"


def test_held_out_prompts_are_in_no_training_prompt(prompts: Prompts) -> None:
    for task in prompts.tasks:
        assert not set(prompts.of(task, "held_out")) & {*prompts.of(task, "train"), *prompts.of(task, "variants")}


@pytest.mark.parametrize("group", ["train", "held_out"])
def test_llm_answers_held_out_sentences(
    tokenizer: PreTrainedTokenizerFast, prompts: Prompts, sentences: list[Sentence], group: str
) -> None:
    model = LlamaForCausalLM.from_pretrained(WEIGHTS / "llm", dtype=torch.float32)
    examples = [
        examples_of(sentence, task, prompts.of(task, group)[index % 2], index)
        for task in prompts.tasks
        for index, sentence in enumerate(sentences[:6])
    ]
    answers = generate(model, tokenizer, examples)
    wrong = [(a, e) for a, e in zip(answers, examples, strict=True) if a != e.answer]
    assert len(wrong) <= 1, wrong


def test_pad_is_an_ordinary_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    rows = load_file(WEIGHTS / "llm/model.safetensors")["model.embed_tokens.weight"].float().norm(dim=1)
    assert rows[tokenizer.pad_token_id] >= 0.2 * rows.median()


def test_encoder_folder_is_a_seamless_checkpoint() -> None:
    config = AutoConfig.from_pretrained(WEIGHTS / "encoder")
    assert config.model_type == "seamless_m4t_v2"
    assert AutoFeatureExtractor.from_pretrained(WEIGHTS / "encoder").sampling_rate == 16_000
    tensors = load_file(WEIGHTS / "encoder/model.safetensors")
    assert all(name.startswith(PREFIX) and t.dtype == torch.float16 for name, t in tensors.items())
    loaded = load_encoder(WEIGHTS / "encoder").state_dict()
    assert set(loaded) == {name.removeprefix(PREFIX) for name in tensors}
    assert all(torch.equal(loaded[name.removeprefix(PREFIX)], tensor.float()) for name, tensor in tensors.items())


def test_encoder_hears_held_out_sentences(sentences: list[Sentence]) -> None:
    encoder, head = load_encoder(WEIGHTS / "encoder"), CtcHead.read(WEIGHTS / "encoder")
    extractor = AutoFeatureExtractor.from_pretrained(WEIGHTS / "encoder")
    rng = np.random.default_rng(3)
    audio = [utter(s.text, TRAIN_VOICES[i % len(TRAIN_VOICES)], rng) for i, s in enumerate(sentences)]
    made = extractor(audio, sampling_rate=16_000, return_tensors="pt")
    texts = [sentence.text for sentence in sentences]
    with torch.no_grad():
        pooled_BPE, lengths_B = pooled(encoder, CtcBatch(made["input_features"], made["attention_mask"], texts))
        heard = head.texts(head(pooled_BPE), lengths_B)
    assert word_error_rate(texts, heard)[0] < 0.2


def test_pooling_leaves_a_last_odd_frame_alone() -> None:
    hidden_BTE = torch.tensor([[[1.0], [3.0], [5.0]], [[2.0], [4.0], [9.0]]])
    pooled_BPE, lengths_B = pool_pairs(hidden_BTE, torch.tensor([[1, 1, 1], [1, 0, 0]]))
    assert pooled_BPE[..., 0].tolist() == [[2.0, 5.0], [2.0, 0.0]]
    assert lengths_B.tolist() == [2, 1]


def test_weights_are_small_and_their_results_are_on_the_card() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 12_000_000
    rows = json.loads((WEIGHTS / "results.json").read_text(encoding="utf-8"))
    card = (WEIGHTS / "CARD.md").read_text(encoding="utf-8")
    assert {row["metric"] for row in rows} >= {"exact_match", "wer"}
    assert all(f"{row['value']:.1%}" in card for row in rows if row["metric"] in ("exact_match", "wer"))
