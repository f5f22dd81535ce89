"""The miniature's LLM: a tokenizer and a tiny Llama that follows instructions, trained from scratch on text alone.

Shape letters: B items, L tokens, D LLM width, V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from sacrebleu.metrics.chrf import CHRF
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sm_train.config import fingerprint, to_mapping
from tools.miniature.chat import Encoder, Example, Prompts, examples_of
from tools.miniature.lessons import IGNORED, Batch, LlmConfig, lessons, practice
from tools.miniature.tokenizer import train_tokenizer, whole_words
from tools.miniature.training import Row, fit, score_row, share_row
from tools.miniature.warm import start_from
from tools.miniature.world import Sentence, World

MINUTES = "minutes.json"


def build_llm(config: LlmConfig, world: World, prompts: Prompts, folder: Path, cache: Path, seed: int) -> list[Row]:
    """Train tokenizer and model in two goes, write them to ``folder`` in fp16, and score what was written."""
    asked = {name: value for name, value in to_mapping(config).items() if not name.startswith("practice_")}
    first = cache / f"llm-{fingerprint({'llm': asked, 'world': to_mapping(world.config), 'seed': seed})}"
    if not (first / MINUTES).is_file():
        _first_training(config, world, prompts, first, seed)
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(first)
    model = LlamaForCausalLM.from_pretrained(first, dtype=torch.float32)
    torch.manual_seed(seed + 1)
    rng = np.random.default_rng([seed, 1])
    tests = [world.sample(rng, "test") for _ in range(config.test_sentences)]
    minutes = fit(
        "llm practice",
        model,
        practice(config, world, prompts, Encoder(tokenizer), rng),
        lambda batch: _loss(model, batch, config),
        config.practice_steps,
        config.practice_rate,
        config.warm_up,
        lambda step: _glance(model, tokenizer, prompts, tests[:25]),
        config.check_every,
    )
    _save(model, tokenizer, folder)
    shipped = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    words = whole_words(tokenizer, world.word_types())
    steps, minutes = config.steps + config.practice_steps, minutes + json.loads((first / MINUTES).read_text())
    rows = [
        score_row("tokenizer", "English words that are one token", "share", words, len(world.word_types())),
        score_row("llm", "parameters", "count", shipped.num_parameters(), 1),
        score_row("llm", f"training, {steps} steps", "minutes", minutes, steps),
    ]
    return rows + evaluate_llm(shipped, tokenizer, prompts, tests)


def _first_training(config: LlmConfig, world: World, prompts: Prompts, folder: Path, seed: int) -> None:
    """From nothing to a model that knows every task; its minutes are written last."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tokenizer = _tokenizer(config, world, prompts, rng)
    print(f"llm tokenizer of {len(tokenizer)} tokens", flush=True)
    model = _model(config, tokenizer)
    if config.start_from:
        known = start_from(model, tokenizer, Path(config.start_from))
        print(f"llm goes on from {config.start_from}, which knows {known} of the tokens", flush=True)
    tests = [world.sample(rng, "test") for _ in range(config.test_sentences)]
    minutes = fit(
        "llm",
        model,
        lessons(config, world, prompts, Encoder(tokenizer), rng),
        lambda batch: _loss(model, batch, config),
        config.steps,
        config.learning_rate,
        config.warm_up,
        lambda step: _glance(model, tokenizer, prompts, tests[:25]),
        config.check_every,
    )
    _save(model, tokenizer, folder)
    (folder / MINUTES).write_text(json.dumps(minutes), encoding="utf-8")


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
            if base == "st":
                score = CHRF().corpus_score(answers, [[example.answer for example in examples]]).score
                rows.append(score_row(system, task, "chrf", score, len(examples)))
                print(f"{system}, {task}: chrF {score:.1f}", flush=True)
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


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write both; the tokenizer with its template inside, under the class name that transformers 4 knows too."""
    model.half().config.dtype = torch.float16
    model.save_pretrained(folder)
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
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    # Llama's own module zeroes its padding row; this pad is an ordinary row that the model sees and learns.
    model.model.embed_tokens.padding_idx = None
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=config.embedding_std)
    # Output rows start along the input rows: one map in attention then copies every token, seen before or not.
    model.lm_head.weight.data.copy_(0.04 * model.model.embed_tokens.weight.data)
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    print(f"llm of {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    return model


def _loss(model: LlamaForCausalLM, batch: Batch, config: LlmConfig) -> torch.Tensor:
    """Cross-entropy on the answers, under NEFTune's noise of alpha / sqrt(L * D) on every input embedding."""
    embeds_BLD = model.get_input_embeddings()(batch.ids_BL)
    lengths_B11 = batch.mask_BL.sum(1)[:, None, None]
    noise_BLD = torch.empty_like(embeds_BLD).uniform_(-1, 1)
    embeds_BLD = embeds_BLD + noise_BLD * config.neftune_alpha / (lengths_B11 * embeds_BLD.shape[2]).sqrt()
    answered = batch.labels_BL[:, 1:] != IGNORED
    with torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16):
        made = model.model(inputs_embeds=embeds_BLD, attention_mask=batch.mask_BL, use_cache=False)
        logits = model.lm_head(made.last_hidden_state[:, :-1][answered])
    return cross_entropy(logits.float(), batch.labels_BL[:, 1:][answered])


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
