"""Going on from a smaller world's checkpoint: what it knows is kept, and new tokens begin where known ones are.

Shape letters: V vocabulary, K known tokens, D LLM width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from sm_train.errors import UserError

ROWS = ("model.embed_tokens.weight", "lm_head.weight")


@torch.no_grad()
def start_from(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> int:
    """Give ``model`` the layers of the checkpoint in ``folder`` and, token string by token string, its rows.

    A new token's input row is drawn around the known ones' mean with their spread; its output row is what the known
    tokens' output rows are of their input rows by least squares, scaled to their spread, so that attention copies a
    new token as it copies a known one. Returns how many tokens were known.

    Raises:
        UserError: the checkpoint has another shape.
    """
    known = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    theirs = AutoTokenizer.from_pretrained(folder).get_vocab()
    pairs = [(row, theirs[token]) for token, row in tokenizer.get_vocab().items() if token in theirs]
    ours_K, theirs_K = (torch.tensor(rows) for rows in zip(*sorted(pairs), strict=True))
    state = model.state_dict()
    for name, tensor in state.items():
        other = known.get(name)
        if other is None or other.shape[1:] != tensor.shape[1:] or (name not in ROWS and other.shape != tensor.shape):
            raise UserError(f"start_from: {folder} has another shape at {name}; name a checkpoint of the same layers")
        if name not in ROWS:
            tensor.copy_(other)
    inputs_KD, outputs_KD = (known[name][theirs_K] for name in ROWS)
    inputs_VD = inputs_KD.mean(0) + inputs_KD.std(0) * torch.randn(len(tokenizer), inputs_KD.shape[1])
    outputs_VD = inputs_VD @ torch.linalg.lstsq(inputs_KD, outputs_KD).solution
    outputs_VD *= outputs_KD.std() / outputs_VD.std()
    inputs_VD[ours_K], outputs_VD[ours_K] = inputs_KD, outputs_KD
    for name, rows_VD in zip(ROWS, (inputs_VD, outputs_VD), strict=True):
        state[name].copy_(rows_VD)
    return len(pairs)
