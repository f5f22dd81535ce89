"""The miniature's tokenizer: byte-level BPE with the pre-tokenizer of Llama 3, whose words are the world's words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tools.miniature.chat import BOS, CHAT_TEMPLATE, END, PAD, SPECIAL_TOKENS

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(
    texts: Iterable[str], words: Iterable[str], vocabulary: int, word_weight: int, max_length: int
) -> PreTrainedTokenizerFast:
    """A tokenizer of ``texts`` in which most of ``words`` are one token, behind a space and at a line's start."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_weighted(texts, sorted(words), word_weight), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in (PAD, BOS, END)],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def whole_words(tokenizer: PreTrainedTokenizerFast, words: Iterable[str]) -> float:
    """The share of words that are one token in both places."""
    known = list(words)
    single = [w for w in known if all(len(tokenizer.encode(f, add_special_tokens=False)) == 1 for f in (w, f" {w}"))]
    return len(single) / len(known)


def _weighted(texts: Iterable[str], words: list[str], weight: int) -> Iterator[str]:
    yield from texts
    for word in words:
        yield from [f"{word} {word}"] * weight
