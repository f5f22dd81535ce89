"""The frozen LLM at inference: embeddings in, greedy text out.

Shape letters: B prompts, L tokens, N vectors of one prompt, D LLM width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sm_train import config
from sm_train.chat import Chat
from sm_train.data.target_set import TargetSet
from sm_train.errors import UserError
from sm_train.models import checkpoints
from sm_train.models.adapter import Adapters
from sm_train.models.embedding import require_embeddings
from sm_train.models.speech import device_here
from sm_train.models.staging import stage
from sm_train.models.tokenizer import Tokenizer, read_tokenizer

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LlmConfig:
    """Where the LLM comes from and how it runs."""

    path: str = config.key(config.REQUIRED, "folder or hub repository of the LLM")
    revision: str | None = config.key(None, "hub revision to pin; null for a folder")
    dtype: str = config.key("float32", "float32 | bfloat16 | float16")
    device: str = config.key("auto", "auto | cpu | cuda")
    device_map: str | None = config.key(None, "auto spreads the layers over the GPUs of one node")
    stage_to: str | None = config.key(None, "folder on the node's own disk: the LLM is copied there first, once a node")

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"llm.dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")


def load_model(
    path: str, revision: str | None, dtype: str, device_map: str | None = None, copy: Path | None = None
) -> Any:
    """The causal LM of a folder or hub repository, frozen, in evaluation mode; on the CPU unless a map says otherwise.

    Args:
        copy: a folder with the same files, to read them from.

    Raises:
        UserError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = copy or checkpoints.resolve(path, revision, "LLM")
    how: dict[str, Any] = {"dtype": getattr(torch, dtype), "use_safetensors": True, "trust_remote_code": False}
    if device_map:
        how["device_map"] = device_map
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, **how)
    except (OSError, ValueError) as error:
        raise UserError(f"LLM {path} cannot be loaded: {str(error).strip().splitlines()[0][:300]}") from None
    return model.eval().requires_grad_(False)


class TargetsLlm:
    """The LLM of a target set, before it is loaded: what can be said of it from its small files and its embedding.

    Args:
        path: folder or hub repository; None for the one that the targets came from.

    Raises:
        UserError: it is not there.
    """

    def __init__(self, targets: TargetSet, path: str | None, revision: str | None) -> None:
        contract = targets.contract
        self.path: str = path or contract["llm"]
        self.revision: str | None = revision if path else contract["llm_revision"]
        self.targets, self.folder = targets, checkpoints.resolve(self.path, self.revision, "LLM")

    def chat(self) -> Chat:
        """Its chat template.

        Raises:
            UserError: its tokenizer, its pad or its embedding is not the targets'.
        """
        tokenizer = Tokenizer(self.folder, self.targets.contract["pad_token"])
        tokenizer.require_same_as(self.targets)
        self.num_embeddings = require_embeddings(self.folder, self.targets)
        tokenizer.warn_of_pad()
        return Chat(tokenizer.inner)

    def staged(self, to: str | None) -> Path:
        """The folder to load it from: a copy on the node's own disk, or its own; see :func:`staging.stage`."""
        return stage(self.folder, to)

    def facts(self) -> dict[str, Any]:
        """What a run against it must go on with."""
        return {"llm": self.path, "llm_revision": self.revision, "llm_hash": checkpoints.fingerprint(self.folder)}

    def require_ids(self, largest: int) -> None:
        """Raises UserError if it does not embed every id up to ``largest``."""
        if largest >= self.num_embeddings:
            raise UserError(
                f"LLM {self.path} embeds {self.num_embeddings} tokens, but its prompts or answers hold the id "
                f"{largest}: a token was added to its tokenizer alone"
            )

    def require_no_dropout(self) -> None:
        """Raises UserError if its config has dropout: it would be on where activations are computed again."""
        for name, value in self._settings().items():
            if "drop" in name and isinstance(value, int | float) and value > 0:
                raise UserError(
                    f"checkpoint_activations: LLM {self.path} has {name} {value} in its config; it must be 0"
                )

    def require_room(self, row_tokens: int) -> None:
        """Raises UserError if a row of so many tokens is longer than the LLM was made for."""
        limit = self._settings().get("max_position_embeddings")
        if limit and row_tokens > limit:
            raise UserError(
                f"LLM {self.path} takes rows of {limit} tokens, but the longest prompt with its speech and answer has "
                f"{row_tokens}; leave such utterances or answers out"
            )

    def _settings(self) -> dict[str, Any]:
        from transformers import AutoConfig

        settings: dict[str, Any] = (
            AutoConfig.from_pretrained(self.folder, trust_remote_code=False).get_text_config().to_dict()
        )
        return settings


def greedy(own: Any, chat: Chat) -> Any:
    """Settings of greedy decoding for an LLM whose own settings are ``own``: of these, only what ends an answer stays.

    Sampling or a repetition penalty would not be greedy decoding.
    """
    from transformers import GenerationConfig

    ends = [own.eos_token_id] if isinstance(own.eos_token_id, int) else list(own.eos_token_id or [])
    end_ids = sorted({*ends, chat.tokenizer.eos_token_id, chat.end_id} - {None})
    pad_id = chat.tokenizer.pad_token_id
    return GenerationConfig(
        do_sample=False, eos_token_id=end_ids, pad_token_id=end_ids[0] if pad_id is None else pad_id
    )


def read_generation(folder: Path) -> Any:
    """The generation settings that a model loaded from a folder has."""
    from transformers import AutoConfig, GenerationConfig

    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:  # there is no such file: they follow from the model's config
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return GenerationConfig.from_model_config(settings)


class FrozenLlm:
    """A causal LLM that continues prompts given as input embeddings; it counts the tokens that it reads and writes."""

    def __init__(self, cfg: LlmConfig) -> None:
        self.path = cfg.path
        folder = checkpoints.resolve(cfg.path, cfg.revision, "LLM")
        self.tokenizer, self.fingerprint = read_tokenizer(folder), checkpoints.fingerprint(folder)
        self.chat = Chat(self.tokenizer)
        self.model = load_model(cfg.path, cfg.revision, cfg.dtype, cfg.device_map, stage(folder, cfg.stage_to))
        if not cfg.device_map:
            self.model.to(device_here(cfg.device))
        self.adapters = Adapters(self.model)
        self.embeddings = self.model.get_input_embeddings()
        self.device, self.dtype = self.embeddings.weight.device, self.embeddings.weight.dtype
        self.model.generation_config = greedy(self.model.generation_config, self.chat)
        self.end_ids: list[int] = self.model.generation_config.eos_token_id
        self.tokens_read = self.tokens_written = 0

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Input embeddings [N, D] of some ids."""
        with torch.inference_mode():
            vectors: Tensor = self.embeddings(torch.tensor(list(ids), dtype=torch.long, device=self.device))
        return vectors

    def pad(self, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Prompts, each [N, D], as one left-padded batch [B, L, D], and the mask [B, L] of what is real."""
        longest, width = max(len(prompt) for prompt in prompts), prompts[0].shape[1]
        embeds_BLD = torch.zeros(len(prompts), longest, width, dtype=self.dtype, device=self.device)
        mask_BL = torch.zeros(len(prompts), longest, dtype=torch.long, device=self.device)
        for b, prompt in enumerate(prompts):
            embeds_BLD[b, longest - len(prompt) :] = prompt.to(self.device, self.dtype)
            mask_BL[b, longest - len(prompt) :] = 1
        return embeds_BLD, mask_BL

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Tensor], max_new_tokens: int) -> list[str]:
        """Greedy continuations of prompts, each [N, D], as one left-padded batch."""
        embeds_BLD, mask_BL = self.pad(prompts)
        ids_BL = self.model.generate(inputs_embeds=embeds_BLD, attention_mask=mask_BL, max_new_tokens=max_new_tokens)
        is_end_BL = torch.isin(ids_BL, torch.tensor(self.end_ids, device=ids_BL.device)).long()
        self.tokens_read += int(mask_BL.sum())
        self.tokens_written += int((is_end_BL.cumsum(dim=1) - is_end_BL == 0).sum())  # the end itself counts
        texts = self.tokenizer.batch_decode(ids_BL, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [text.strip() for text in texts]
