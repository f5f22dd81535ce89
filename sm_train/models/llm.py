"""The frozen LLM at inference: embeddings in, greedy text out.

Shape letters: B prompts, L tokens, N vectors of one prompt, D LLM width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sm_train import config
from sm_train.data.target_set import TargetSet
from sm_train.errors import UserError
from sm_train.models import checkpoints
from sm_train.models.speech import pick_device

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LlmConfig:
    """Where the LLM comes from and how it runs."""

    path: str = config.key(config.REQUIRED, "folder or hub repository of the LLM")
    revision: str | None = config.key(None, "hub revision to pin; null for a folder")
    dtype: str = config.key("float32", "float32 | bfloat16 | float16")
    device: str = config.key("auto", "auto | cpu | cuda")
    device_map: str | None = config.key(None, "auto spreads the layers over the GPUs of one node")

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"llm.dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")


class FrozenLlm:
    """A causal LLM that continues prompts given as input embeddings."""

    def __init__(self, cfg: LlmConfig) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.path = cfg.path
        folder = checkpoints.resolve(cfg.path, cfg.revision, "LLM")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        placement = {"device_map": cfg.device_map} if cfg.device_map else {}
        try:
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, cfg.dtype), **placement)
        except (OSError, ValueError) as error:
            raise UserError(f"LLM {cfg.path} cannot be loaded: {str(error).strip().splitlines()[0][:300]}") from None
        if not cfg.device_map:
            self.model.to(pick_device(cfg.device))
        self.model.eval().requires_grad_(False)
        self.embeddings = self.model.get_input_embeddings()
        self.device, self.dtype = self.embeddings.weight.device, self.embeddings.weight.dtype
        self.end_ids = self.model.generation_config.eos_token_id
        end = self.end_ids if isinstance(self.end_ids, int) else self.end_ids[0] if self.end_ids else None
        self.pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else end

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Input embeddings [N, D] of some ids."""
        with torch.inference_mode():
            vectors: Tensor = self.embeddings(torch.tensor(list(ids), dtype=torch.long, device=self.device))
        return vectors

    def require_embeddings(self, targets: TargetSet) -> None:
        """Raises UserError unless this LLM embeds the targets' tokens as the targets have them."""
        own_RD = self.embed(targets.token_ids.tolist()[:512]).float().cpu()
        theirs_RD = targets.rows_RD[:512].to(self.dtype).float()
        if own_RD.shape != theirs_RD.shape or not torch.allclose(own_RD, theirs_RD, rtol=1e-2, atol=1e-3):
            raise UserError(
                f"LLM {self.path} does not embed tokens as target set {targets.root} has them; "
                f"name the LLM that the targets came from ({targets.contract['llm']})"
            )

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Tensor], max_new_tokens: int) -> list[str]:
        """Greedy continuations of prompts, each [N, D], as one left-padded batch."""
        longest = max(len(prompt) for prompt in prompts)
        width = prompts[0].shape[1]
        embeds_BLD = torch.zeros(len(prompts), longest, width, dtype=self.dtype, device=self.device)
        mask_BL = torch.zeros(len(prompts), longest, dtype=torch.long, device=self.device)
        for b, prompt in enumerate(prompts):
            embeds_BLD[b, longest - len(prompt) :] = prompt.to(self.device, self.dtype)
            mask_BL[b, longest - len(prompt) :] = 1
        ids_BL = self.model.generate(
            inputs_embeds=embeds_BLD, attention_mask=mask_BL, max_new_tokens=max_new_tokens, do_sample=False,
            temperature=None, top_p=None, top_k=None, pad_token_id=self.pad_id, eos_token_id=self.end_ids,
        )  # fmt: skip
        texts = self.tokenizer.batch_decode(ids_BL, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [text.strip() for text in texts]
