"""An LLM's tokenizer, and the pad that fills the positions after a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sm_train import config
from sm_train.data.shards import require_same
from sm_train.data.target_set import TargetSet
from sm_train.errors import UserError
from sm_train.runlog import say


def read_tokenizer(folder: Path) -> Any:
    """The Hugging Face tokenizer in an LLM's folder.

    Raises:
        UserError: there is none that can be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever its library makes of a damaged file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"LLM {folder}: its tokenizer cannot be loaded ({reason})") from None


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of everything that a fast tokenizer's ids follow from."""
    return config.fingerprint({"tokenizer": tokenizer.backend_tokenizer.to_str()})


class Tokenizer:
    """An LLM's tokenizer and its pad.

    Raises:
        UserError: the pad is not named and the tokenizer has none, or the named one is unknown.
    """

    def __init__(self, folder: Path, pad_token: str | None) -> None:
        self.folder, self.inner = folder, read_tokenizer(folder)
        name = pad_token or self.inner.pad_token
        special = [t for t in self.inner.get_added_vocab() if t != self.inner.eos_token]
        candidates = ", ".join(special[:8]) or "none found"
        if name is None:
            raise UserError(
                f"LLM {folder}: its tokenizer has no pad token; name one as pad_token (special tokens: {candidates})"
            )
        self.pad_id: int = self.inner.convert_tokens_to_ids(name)
        if self.pad_id is None or (self.pad_id == self.inner.unk_token_id and name != self.inner.unk_token):
            raise UserError(f"LLM {folder}: pad_token {name!r} is not in its vocabulary (special tokens: {candidates})")
        self.pad_token: str = name
        self.pad_is_eos: bool = self.pad_id == self.inner.eos_token_id

    def ids(self, text: str) -> list[int]:
        """The ids of a text alone, without special tokens."""
        return list(self.inner(text, add_special_tokens=False)["input_ids"])

    def text(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens left out."""
        return str(self.inner.decode(list(ids), skip_special_tokens=True))

    def warn_of_pad(self) -> None:
        """Say so if the pad also ends a sequence."""
        if self.pad_is_eos:
            say(
                f"warning: LLM {self.folder}: pad_token {self.pad_token!r} also ends a sequence, so that a mapper "
                "learns to put ends behind the text; name a reserved token as pad_token in the targets' config"
            )

    def require_same_as(self, targets: TargetSet) -> None:
        """Raises UserError unless this is the tokenizer, with the pad, that a target set came from."""
        own = {"tokenizer_hash": tokenizer_hash(self.inner), "pad_id": self.pad_id}
        theirs = {name: targets.contract[name] for name in own}
        remedy = f"name the LLM that the targets came from ({targets.contract['llm']}), or make targets for this one"
        require_same(own, theirs, f"LLM {self.folder} and target set {targets.root}", remedy)
