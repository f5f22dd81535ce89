"""The shipped checkpoints of the miniature: formats, seams, sizes, and that they still answer."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoFeatureExtractor, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from sm_train.config import load, to_mapping
from tools.miniature.build import BuildConfig, is_same
from tools.miniature.build_encoder import PREFIX, load_encoder, pooled
from tools.miniature.build_llm import generate
from tools.miniature.chat import Prompts, chat_pieces, examples_of
from tools.miniature.ctc import CtcBatch, CtcHead, pool_pairs, word_error_rate
from tools.miniature.speech import TRAIN_VOICES, utter
from tools.miniature.tokenizer import whole_words
from tools.miniature.world import Sentence, World

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools/miniature"


@dataclass(frozen=True)
class Shipped:
    """The checkpoints of a level."""

    folder: Path
    build: str
    snr_db: float | None
    max_word_errors: float
    max_wrong: int
    max_bytes: int
    encoders: tuple[str, ...]


SHIPPED = {
    "easy": Shipped(TOOLS / "weights", "build.yaml", None, 0.2, 1, 12_000_000, ("encoder",)),
    "hard": Shipped(TOOLS / "weights-hard", "build-hard.yaml", 15.0, 0.4, 6, 20_000_000, ("encoder", "ssl")),
}
ENCODERS = [(name, part) for name, level in SHIPPED.items() for part in level.encoders]


@pytest.fixture(scope="module", params=SHIPPED)
def shipped(request: pytest.FixtureRequest) -> Shipped:
    return SHIPPED[request.param]


@pytest.fixture(scope="module")
def config(shipped: Shipped) -> BuildConfig:
    return load(BuildConfig, [str(ROOT / "configs/miniature" / shipped.build)], "test")


@pytest.fixture(scope="module")
def tokenizer(shipped: Shipped) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(shipped.folder / "llm")


@pytest.fixture(scope="module")
def prompts(config: BuildConfig) -> Prompts:
    return Prompts(ROOT / config.prompts)


@pytest.fixture(scope="module")
def sentences(config: BuildConfig) -> list[Sentence]:
    world, rng = World(config.world), np.random.default_rng(5)
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


def test_held_out_prompts_are_made_of_words_that_were_trained_on(config: BuildConfig, prompts: Prompts) -> None:
    def words(texts: list[str]) -> set[str]:
        return set(re.findall(r"\w+", " ".join(texts).lower()))

    known = words(
        [text for task in prompts.tasks for group in ("train", "variants") for text in prompts.of(task, group)]
    )
    for task in prompts.tasks:
        assert words(prompts.of(task, "held_out")) <= known
        assert len(prompts.of(task, "held_out")) >= (8 if config.world.level == "hard" else 2)


@pytest.mark.parametrize("group", ["train", "held_out"])
def test_llm_answers_held_out_sentences(
    shipped: Shipped, tokenizer: PreTrainedTokenizerFast, prompts: Prompts, sentences: list[Sentence], group: str
) -> None:
    model = LlamaForCausalLM.from_pretrained(shipped.folder / "llm", dtype=torch.float32)
    examples = [
        examples_of(sentence, task, prompts.of(task, group)[index % 2], index)
        for task in prompts.tasks
        for index, sentence in enumerate(sentences[:6])
    ]
    answers = generate(model, tokenizer, examples)
    wrong = [(a, e) for a, e in zip(answers, examples, strict=True) if a != e.answer]
    assert len(wrong) <= shipped.max_wrong, wrong


def test_pad_is_an_ordinary_token(shipped: Shipped, tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    rows = load_file(shipped.folder / "llm/model.safetensors")["model.embed_tokens.weight"].float().norm(dim=1)
    assert rows[tokenizer.pad_token_id] >= 0.2 * rows.median()


def test_every_english_word_is_one_token(tokenizer: PreTrainedTokenizerFast, config: BuildConfig) -> None:
    assert whole_words(tokenizer, World(config.world).word_types()) == 1.0


@pytest.mark.parametrize(("level", "part"), ENCODERS)
def test_encoder_folder_is_a_seamless_checkpoint(level: str, part: str) -> None:
    folder = SHIPPED[level].folder / part
    assert AutoConfig.from_pretrained(folder).model_type == "seamless_m4t_v2"
    assert AutoFeatureExtractor.from_pretrained(folder).sampling_rate == 16_000
    tensors = load_file(folder / "model.safetensors")
    assert all(name.startswith(PREFIX) and t.dtype == torch.float16 for name, t in tensors.items())
    loaded = load_encoder(folder).state_dict()
    assert set(loaded) == {name.removeprefix(PREFIX) for name in tensors}
    assert all(torch.equal(loaded[name.removeprefix(PREFIX)], tensor.float()) for name, tensor in tensors.items())


def test_encoder_hears_held_out_sentences(shipped: Shipped, sentences: list[Sentence]) -> None:
    folder = shipped.folder / "encoder"
    encoder, head, extractor = load_encoder(folder), CtcHead.read(folder), AutoFeatureExtractor.from_pretrained(folder)
    rng = np.random.default_rng(3)
    voices = [TRAIN_VOICES[index % len(TRAIN_VOICES)] for index in range(len(sentences))]
    audio = [utter(s.text, voice, rng, shipped.snr_db) for s, voice in zip(sentences, voices, strict=True)]
    made = extractor(audio, sampling_rate=16_000, return_tensors="pt")
    texts = [sentence.text for sentence in sentences]
    with torch.no_grad():
        pooled_BPE, lengths_B = pooled(encoder, CtcBatch(made["input_features"], made["attention_mask"], texts))
        heard = head.texts(head(pooled_BPE), lengths_B)
    assert word_error_rate(texts, heard)[0] < shipped.max_word_errors


def test_pooling_leaves_a_last_odd_frame_alone() -> None:
    hidden_BTE = torch.tensor([[[1.0], [3.0], [5.0]], [[2.0], [4.0], [9.0]]])
    pooled_BPE, lengths_B = pool_pairs(hidden_BTE, torch.tensor([[1, 1, 1], [1, 0, 0]]))
    assert pooled_BPE[..., 0].tolist() == [[2.0, 5.0], [2.0, 0.0]]
    assert lengths_B.tolist() == [2, 1]


def test_weights_are_small_and_their_results_are_on_the_card(shipped: Shipped) -> None:
    sizes = [path.stat().st_size for path in shipped.folder.rglob("*") if path.is_file()]
    assert (sum(sizes) < shipped.max_bytes, max(sizes) < 8_000_000) == (True, True)
    rows = json.loads((shipped.folder / "results.json").read_text(encoding="utf-8"))
    card = (shipped.folder / "CARD.md").read_text(encoding="utf-8")
    assert {row["metric"] for row in rows} >= {"exact_match", "wer"}
    assert all(f"{row['value']:.1%}" in card for row in rows if row["metric"] in ("exact_match", "wer", "cer"))


def test_a_build_from_before_a_key_was_added_is_still_the_same(config: BuildConfig, shipped: Shipped) -> None:
    values = to_mapping(config)
    asked = {name: values[name] for name in ("seed", "threads", "world", "encoder")}
    recorded = json.loads((shipped.folder / "encoder/build.json").read_text(encoding="utf-8"))["config"]
    assert is_same(recorded, asked)
    assert not is_same(recorded | {"seed": 18}, asked)
    assert not is_same(recorded | {"encoder": recorded["encoder"] | {"word_steps": 1}}, asked)
