"""The miniature's LLM: a tokenizer and a tiny Llama that follows instructions, trained from scratch on text alone.

Shape letters: B items, L tokens, D LLM width, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sm_train.config import key
from tools.miniature.chat import Encoder, Example, Prompts, examples_of
from tools.miniature.tokenizer import train_tokenizer, whole_words
from tools.miniature.training import Row, bucketed, fit, score_row, share_row
from tools.miniature.world import Sentence, World

TASK_SHARES = {"asr": 0.2, "st": 0.5, "sqa": 0.3}
IGNORED = -100


@dataclass(frozen=True)
class LlmConfig:
    """How the miniature's LLM is made."""

    vocabulary: int = key(2304, "tokens of the tokenizer")
    tokenizer_sentences: int = key(20000, "sentences whose texts train the tokenizer")
    word_weight: int = key(3000, "extra occurrences of each English word in the tokenizer's texts")
    width: int = key(160, "hidden size")
    feed_forward: int = key(448, "width of the feed-forward layers")
    layers: int = key(4, "decoder layers")
    heads: int = key(4, "attention heads")
    max_length: int = key(512, "positions the model is made for")
    tied: bool = key(False, "one matrix for input and output embeddings")
    embedding_std: float = key(1.0, "spread of the embedding rows at the start")
    steps: int = key(3000, "training steps")
    batch_size: int = key(32, "examples a step")
    learning_rate: float = key(2e-3, "peak of the one-cycle schedule")
    warm_up: float = key(0.05, "share of the steps in which the learning rate rises")
    variants: float = key(0.5, "share of examples whose prompt is a generated variant of the shipped ones")
    padded: float = key(0.3, "share of examples whose transcript is followed by pad tokens")
    max_pads: int = key(20, "the most pad tokens behind a transcript")
    neftune_alpha: float = key(30.0, "uniform noise on input embeddings, alpha of NEFTune (arXiv 2310.05914)")
    check_every: int = key(300, "steps between looks at exact match")
    test_sentences: int = key(200, "held-out sentences of the final evaluation")


class Batch(NamedTuple):
    """Examples of one step, padded on the right."""

    ids_BL: torch.Tensor
    mask_BL: torch.Tensor
    labels_BL: torch.Tensor


def build_llm(config: LlmConfig, world: World, prompts: Prompts, folder: Path, seed: int) -> list[Row]:
    """Train tokenizer and model, write them to ``folder`` in fp16, and score what was written."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tokenizer = _tokenizer(config, world, prompts, rng)
    words = whole_words(tokenizer, world.word_types())
    print(f"llm tokenizer of {len(tokenizer)} tokens, {words:.1%} of English words are one token", flush=True)
    model = _model(config, tokenizer)
    encoder = Encoder(tokenizer)
    tests = [world.sample(rng, "test") for _ in range(config.test_sentences)]
    minutes = fit(
        "llm",
        model,
        _batches(config, world, prompts, encoder, rng),
        lambda batch: _loss(model, batch, config.neftune_alpha),
        config.steps,
        config.learning_rate,
        config.warm_up,
        lambda step: _glance(model, tokenizer, prompts, tests[:25]),
        config.check_every,
    )
    model.half().config.dtype = torch.float16
    model.save_pretrained(folder)
    _save_tokenizer(tokenizer, folder)
    shipped = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = [
        score_row("tokenizer", "English words that are one token", "share", words, len(world.word_types())),
        score_row("llm", "parameters", "count", shipped.num_parameters(), 1),
        score_row("llm", f"training, {config.steps} steps", "minutes", minutes, config.steps),
    ]
    return rows + evaluate_llm(shipped, tokenizer, prompts, tests)


def evaluate_llm(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Prompts, tests: list[Sentence]
) -> list[Row]:
    """Exact match by greedy generation: each task with trained and with held-out prompts, and with a padded tail."""
    rows = []
    for group, num_pads in (("train", 0), ("held_out", 0), ("train", 12)):
        for task in ("asr", "st_fr", "st_de", "sqa"):
            base, pick = task.split("_")[0], {"st_fr": 0, "st_de": 1}.get(task)
            choices = prompts.of(base, group)
            examples = [
                examples_of(sentence, base, choices[index % len(choices)], index if pick is None else pick)
                for index, sentence in enumerate(tests)
            ]
            answers = generate(model, tokenizer, examples, num_pads)
            hits = [a == e.answer for a, e in zip(answers, examples, strict=True)]
            system = f"llm, {group} prompts" + (f", {num_pads} pads" if num_pads else "")
            rows.append(share_row(system, task, "exact_match", hits))
            print(f"{system}, {task}: {rows[-1]['value']:.3f}", flush=True)
    return rows


@torch.no_grad()
def generate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: list[Example], num_pads: int = 0
) -> list[str]:
    """Greedy answers, in batches of padded prompts."""
    encoder = Encoder(tokenizer)
    answers: list[str] = []
    for start in range(0, len(examples), 50):
        prompts = [encoder.prompt_ids(example, num_pads) for example in examples[start : start + 50]]
        width = max(len(ids) for ids in prompts)
        ids_BL = torch.full((len(prompts), width), tokenizer.pad_token_id)
        mask_BL = torch.zeros_like(ids_BL)
        for row, ids in enumerate(prompts):
            ids_BL[row, width - len(ids) :] = torch.tensor(ids)
            mask_BL[row, width - len(ids) :] = 1
        out_BL = model.generate(ids_BL, attention_mask=mask_BL, max_new_tokens=64)
        answers += tokenizer.batch_decode(out_BL[:, width:], skip_special_tokens=True)
    return answers


def _tokenizer(config: LlmConfig, world: World, prompts: Prompts, rng: np.random.Generator) -> PreTrainedTokenizerFast:
    texts = [text for task in prompts.tasks for text in prompts.of(task, "variants")]
    for _ in range(config.tokenizer_sentences):
        sentence = world.sample(rng, "train")
        texts += [sentence.text, sentence.french, sentence.german]
        texts += [text for question in sentence.questions for text in (question.question, question.answer)]
    return train_tokenizer(texts, world.word_types(), config.vocabulary, config.word_weight, config.max_length)


def _save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the tokenizer with its chat template inside, under the class name that transformers 4 knows too."""
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _model(config: LlmConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            intermediate_size=config.feed_forward,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=config.max_length,
            initializer_range=0.04,
            tie_word_embeddings=config.tied,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    # Llama's own module zeroes its padding row; this pad is an ordinary row that the model sees and learns.
    model.model.embed_tokens.padding_idx = None
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=config.embedding_std)
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    print(f"llm of {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    return model


def _batches(
    config: LlmConfig, world: World, prompts: Prompts, encoder: Encoder, rng: np.random.Generator
) -> Iterator[Batch]:
    """Endless fresh examples, drawn 16 batches at a time and sorted by length."""
    tasks, shares = list(TASK_SHARES), list(TASK_SHARES.values())
    while True:
        pairs = []
        for _ in range(16 * config.batch_size):
            task = str(rng.choice(tasks, p=shares))
            prompt = prompts.sample(rng, task, config.variants)
            example = examples_of(world.sample(rng, "train"), task, prompt, int(rng.integers(1 << 16)))
            num_pads = int(rng.integers(1, config.max_pads + 1)) if rng.random() < config.padded else 0
            pairs.append((encoder.prompt_ids(example, num_pads), encoder.answer_ids(example)))
        for rows in bucketed(np.array([len(p) + len(a) for p, a in pairs]), config.batch_size, rng):
            yield _collate([pairs[row] for row in rows])


def _collate(pairs: list[tuple[list[int], list[int]]]) -> Batch:
    width = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids_BL = torch.zeros(len(pairs), width, dtype=torch.long)
    mask_BL = torch.zeros_like(ids_BL)
    labels_BL = torch.full_like(ids_BL, IGNORED)
    for row, (prompt, answer) in enumerate(pairs):
        length = len(prompt) + len(answer)
        ids_BL[row, :length] = torch.tensor(prompt + answer)
        mask_BL[row, :length] = 1
        labels_BL[row, len(prompt) : length] = torch.tensor(answer)
    return Batch(ids_BL, mask_BL, labels_BL)


def _loss(model: LlamaForCausalLM, batch: Batch, alpha: float) -> torch.Tensor:
    """Cross-entropy on the answers, under NEFTune's noise of alpha / sqrt(L * D) on every input embedding."""
    embeds_BLD = model.get_input_embeddings()(batch.ids_BL)
    lengths_B11 = batch.mask_BL.sum(1)[:, None, None]
    noise_BLD = torch.empty_like(embeds_BLD).uniform_(-1, 1)
    embeds_BLD = embeds_BLD + noise_BLD * alpha / (lengths_B11 * embeds_BLD.shape[2]).sqrt()
    hidden_BLD = model.model(inputs_embeds=embeds_BLD, attention_mask=batch.mask_BL, use_cache=False).last_hidden_state
    answered = batch.labels_BL[:, 1:] != IGNORED
    logits = model.lm_head(hidden_BLD[:, :-1][answered])
    return cross_entropy(logits, batch.labels_BL[:, 1:][answered])


def _glance(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Prompts, tests: list[Sentence]
) -> str:
    """Exact match on a few sentences with the first prompt of each task."""
    shares = []
    for task in prompts.tasks:
        examples = [examples_of(s, task, prompts.of(task, "train")[0], i) for i, s in enumerate(tests)]
        answers = generate(model, tokenizer, examples)
        shares.append(f"{task} {np.mean([a == e.answer for a, e in zip(answers, examples, strict=True)]):.2f}")
    return "exact " + ", ".join(shares)
