"""Tiny random checkpoints of the LLM families, each with a tokenizer and a chat template of its family's own kind.

Their vocabularies are trained on a few lines; pre-tokenizers, normalisers, special tokens and the strings that the
templates print are the families' own, so that what holds at the seams of a chat string here holds there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LINES = [
    "the old boat runs by the red house", "two birds see the small river of the time", "a word of the people",
    "stone stones stone stones stones", "times time times times times",
    "the green stones the green stones", "seat eat seat eat tones", "user assistant model system",
    "Repeat the following text exactly, and write nothing else.", "You are a helpful assistant.", "...",
    "Translate the text above into French, word for word.", "Answer this question about the text: who sees it?",
    "le vieux bateau file vers la maison rouge", "une pierre verte", "It is 12 or 345 times.",
]  # fmt: skip
SPACE = "▁"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")

LLAMA3_TEMPLATE = (
    "{{ bos_token }}"
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    r"{% macro turn(role, text) %}{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' + text }}{% endmacro %}"
    r"{{ turn('system', 'Cutting Knowledge Date: December 2023\nToday Date: ' + date_string + '\n\n') }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% endif %}<|eot_id|>"
    "{% for m in messages if m.role != 'system' %}{{ turn(m.role, m.content | trim) }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}{{ turn('assistant', '') }}{% endif %}"
)
_CHATML_TURN = r"{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
QWEN2_TEMPLATE = (
    "{% if messages[0].role != 'system' %}"
    r"{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}" + _CHATML_TURN + "{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3_TEMPLATE = (
    r"{% set no_thoughts = '<think>\n\n</think>\n\n' %}"
    "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}"
    r"{{ '<|im_start|>assistant\n' + no_thoughts + m.content + '<|im_end|>\n' }}"
    "{% else %}" + _CHATML_TURN + "{% endif %}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ no_thoughts }}{% endif %}{% endif %}"
)
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('Gemma has no system turn') }}{% endif %}"
    r"{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    r"{{ m.content | trim }}{{ '<end_of_turn>\n' }}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3_TEMPLATE = (
    r"{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def byte_level(split: str, special: list[str], bos: str | None = None, plain: list[str] | None = None) -> Tokenizer:
    """Byte-level BPE behind a split of words; the special tokens come behind the vocabulary."""
    made = Tokenizer(models.BPE(ignore_merges=True))
    splits = [
        pre_tokenizers.Split(Regex(split), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    made.pre_tokenizer = pre_tokenizers.Sequence(splits)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["\n".join(LINES)] * 2 + LINES * 4, trainer)
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain or []])
    return with_bos(made, bos)


def qwen(special: list[str], plain: list[str] | None = None) -> Tokenizer:
    """Llama 3's kind with single digits and Unicode composed."""
    made = byte_level(QWEN_SPLIT, special, plain=plain)
    made.normalizer = normalizers.NFC()
    return made


def sentencepiece(
    control: list[str], bos: str | None, prepend: bool, special: list[str],
    plain: list[str] | None = None, rstrip: bool = False,
) -> Tokenizer:  # fmt: skip
    """BPE as SentencePiece does it: spaces are letters, unknown letters bytes; ``prepend`` puts a space before a text.

    As in the real vocabularies two spaces are the first merge of all.
    """
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "always", True)
    learner.train_from_iterator(LINES * 4, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + [
        SPACE * 2,
        *sorted(learned["vocab"], key=learned["vocab"].get),
    ]
    vocabulary = {piece: id for id, piece in enumerate(dict.fromkeys([*control, *pieces]))}
    merges = [(SPACE, SPACE), *map(tuple, learned["merges"])]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", SPACE)
    made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prepend else replace
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prepend else parts)
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    made.add_special_tokens([AddedToken(token, special=True, normalized=False, rstrip=rstrip) for token in special])
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain or []])
    return with_bos(made, bos)


def with_bos(tokenizer: Tokenizer, bos: str | None) -> Tokenizer:
    """A tokenizer that puts bos before a text when asked for special tokens."""
    if bos:
        ids = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", ids)
    return tokenizer


def gemma() -> Tokenizer:
    """No space before a text; runs of line breaks are tokens of their own."""
    turns = ["<start_of_turn>", "<end_of_turn>"]
    return sentencepiece(["<pad>", "<eos>", "<bos>", "<unk>"], "<bos>", False, turns, ["\n", "\n\n"])


def phi3() -> Tokenizer:
    """Llama 2's vocabulary, with special tokens that swallow the white space behind them."""
    turns = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
    return sentencepiece(["<unk>", "<s>", "</s>"], None, True, turns, rstrip=True)


@dataclass(frozen=True)
class Family:
    """How a family's checkpoint is made."""

    model_type: str
    tokenizer: Callable[[], Tokenizer]
    template: str
    bos: str | None
    eos: str
    pad: str
    ends: list[str]
    """What generation_config.json names as ends of an answer."""
    settings: dict[str, Any] = field(default_factory=dict)


_LLAMA3_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>",
                  "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]  # fmt: skip
_LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 256}  # fmt: skip
_QWEN_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16, "query_pre_attn_scalar": 8}
_MADE = {
    "llama3": Family(
        "llama", lambda: byte_level(LLAMA3_SPLIT, _LLAMA3_TOKENS, "<|begin_of_text|>"), LLAMA3_TEMPLATE,
        "<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>", ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"],
        {"rope_parameters": _LLAMA3_ROPE},
    ),
    "qwen2": Family(
        "qwen2", lambda: qwen(_QWEN_TOKENS), QWEN2_TEMPLATE, None, "<|im_end|>", "<|endoftext|>",
        ["<|im_end|>", "<|endoftext|>"], {"tie_word_embeddings": True},
    ),
    "qwen3": Family(
        "qwen3", lambda: qwen(_QWEN_TOKENS, ["<think>", "</think>"]), QWEN3_TEMPLATE, None, "<|im_end|>",
        "<|endoftext|>", ["<|im_end|>", "<|endoftext|>"], {"tie_word_embeddings": True},
    ),
    "mistral": Family(
        "mistral", lambda: sentencepiece(["<unk>", "<s>", "</s>"], "<s>", True, ["[INST]", "[/INST]"]),
        MISTRAL_TEMPLATE, "<s>", "</s>", "</s>", ["</s>"], {"sliding_window": None},
    ),
    "gemma2": Family(
        "gemma2", gemma, GEMMA_TEMPLATE, "<bos>", "<eos>", "<pad>", ["<eos>", "<end_of_turn>"], _MIXED
    ),
    "gemma3": Family(
        "gemma3_text", gemma, GEMMA_TEMPLATE, "<bos>", "<eos>", "<pad>", ["<eos>", "<end_of_turn>"], _MIXED
    ),
    "phi3": Family(
        "phi3", phi3, PHI3_TEMPLATE, "<s>", "<|endoftext|>", "<|endoftext|>",
        ["<|endoftext|>", "<|assistant|>", "<|end|>"],
    ),
}  # fmt: skip
FAMILIES: tuple[str, ...] = tuple(_MADE)


def family(folder: Path, name: str) -> Path:
    """Write a tiny random checkpoint of a family; returns its folder.

    Args:
        name: one of :data:`FAMILIES`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    made = _MADE[name]
    named = {"bos_token": made.bos, "eos_token": made.eos, "pad_token": made.pad}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made.tokenizer(), chat_template=made.template, clean_up_tokenization_spaces=False,
        **{key: token for key, token in named.items() if token},
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    ids = {f"{key}_id": getattr(tokenizer, f"{key}_id") for key in named}
    config = AutoConfig.for_model(
        made.model_type, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3,
        **({"head_dim": 8} if made.model_type != "phi3" else {}), **ids, **made.settings,
    )  # fmt: skip
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    ids["eos_token_id"] = tokenizer.convert_tokens_to_ids(made.ends)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    return folder


def multimodal_gemma3(folder: Path, dtype: str) -> Path:
    """A tiny random Gemma 3 that sees pictures too, its tensors named as in the published checkpoints."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    tokenizer = gemma()
    text = {
        "vocab_size": tokenizer.get_vocab_size(), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, **_MIXED,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    torch.manual_seed(3)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, dtype=dtype)
    Gemma3ForConditionalGeneration(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder
