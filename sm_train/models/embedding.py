"""An LLM's own input embedding, without building the LLM.

Shape letters: R rows of a target table, L tokens, D LLM width.
"""

from __future__ import annotations

from pathlib import Path

import torch

from sm_train.data.target_set import TargetSet
from sm_train.errors import UserError
from sm_train.models import checkpoints


def embedding_module(folder: Path) -> torch.nn.Module:
    """The LLM's own input-embedding module, in its checkpoint's dtype: ``module(ids)`` is what the LLM would compute.

    The family's model is built with no layers on the CPU (not on meta: Gemma 3 scales by a buffer that no checkpoint
    holds), and one tensor is read by its key.

    Raises:
        UserError: the folder has no input-embedding tensor, or one of another shape than its config says.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        text_settings = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    except Exception as error:  # whatever its library makes of a damaged file
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"LLM {folder}: its config.json cannot be used ({reason})") from None
    name, tensor = _embedding_tensor(folder, tied=text_settings.tie_word_embeddings)
    width = getattr(text_settings, "hidden_size", None)
    if tensor.ndim != 2 or tensor.shape[1] != width:
        raise UserError(
            f"LLM {folder}: tensor {name!r} has the shape {tuple(tensor.shape)}; its config says width {width}"
        )
    text_settings.num_hidden_layers = 0
    if getattr(text_settings, "layer_types", None):
        text_settings.layer_types = []
    # The vocabulary is set to one row while building, so that no full-size random table is ever made.
    text_settings.vocab_size, text_settings.pad_token_id = 1, None
    model = AutoModelForCausalLM.from_config(text_settings, dtype=tensor.dtype)
    module: torch.nn.Module = model.get_input_embeddings()
    module.weight = torch.nn.Parameter(tensor, requires_grad=False)
    module.num_embeddings = len(tensor)  # type: ignore[assignment]
    return module.eval()


def _embedding_tensor(folder: Path, tied: bool) -> tuple[str, torch.Tensor]:
    names = sorted(checkpoints.weight_map(folder))
    endings = ["embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight"]
    for ending in endings + (["lm_head.weight"] if tied else []):
        matches = [name for name in names if name == ending or name.endswith("." + ending)]
        language = [name for name in matches if "vision" not in name and "audio" not in name]
        if len(language) == 1:
            return language[0], checkpoints.read_tensors(folder, {language[0]}, "LLM")[language[0]]
    raise UserError(
        f"LLM {folder} has no one input-embedding tensor (looked for {', '.join(endings)} among {len(names)} tensors)"
    )


def require_embeddings(folder: Path, targets: TargetSet) -> int:
    """How many tokens the LLM in a folder embeds.

    Raises:
        UserError: it does not embed the targets' tokens exactly as the targets have them.
    """
    module, ids = embedding_module(folder), torch.from_numpy(targets.token_ids).long()
    fits = int(ids.max()) < module.num_embeddings  # type: ignore[operator]
    with torch.inference_mode():
        own_RD = module(ids) if fits else None
    if own_RD is None or own_RD.shape != targets.rows_RD.shape or not torch.equal(own_RD, targets.rows_RD):
        raise UserError(
            f"LLM {folder} does not embed tokens as target set {targets.root} has them; "
            f"name the LLM that the targets came from ({targets.contract['llm']})"
        )
    return int(module.num_embeddings)  # type: ignore[arg-type]
