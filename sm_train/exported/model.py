"""A speech LLM, loaded from an exported folder: recordings and prompts in, the frozen LLM's text out.

It is put together from the very parts that evaluation uses, so that it says what evaluation says.
Shape letters: B pairs, L tokens, D LLM width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from sm_train.data.shards import require_same
from sm_train.errors import UserError
from sm_train.exported.processor import Audio, SpeechLlmProcessor
from sm_train.exported.settings import MAPPER, SpeechLlmConfig, open_folder, read_targets
from sm_train.models import checkpoints
from sm_train.models.llm import DTYPES, FrozenLlm
from sm_train.models.speech import SpeechEncoder
from sm_train.models.tokenizer import tokenizer_hash
from sm_train.scoring import mappers
from sm_train.scoring.systems import Heard, Mapped, spoken

_REMEDY = "name the folder of the one it was exported with as {0}=..., or export the run again"


class SpeechLlm(PreTrainedModel):  # type: ignore[misc]
    """The frozen speech encoder, the mapper and the frozen LLM as one model.

    Attributes:
        processor: recordings and prompts as the model takes them.
        generation_config: greedy decoding, its longest answer and the ids that end one.
    """

    config_class = SpeechLlmConfig

    def __init__(
        self, config: SpeechLlmConfig, processor: SpeechLlmProcessor, encoder: SpeechEncoder, mapped: Mapped,
        frozen: FrozenLlm,
    ) -> None:  # fmt: skip
        super().__init__(config)
        self.processor, self._encoder, self._mapped, self._frozen = processor, encoder, mapped, frozen
        self.mapper, self.llm = mapped.mapper, frozen.model
        self.generation_config = frozen.model.generation_config
        self.eval()

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, config: SpeechLlmConfig | None = None, dtype: str | torch.dtype | None = None,
        device: str | torch.device = "auto", device_map: str | None = None, speech_encoder: str | None = None,
        llm: str | None = None, revision: str | None = None, trust_remote_code: bool | None = None,
        adapter_kwargs: dict[str, Any] | None = None, _from_auto: bool = False,
    ) -> SpeechLlm:  # fmt: skip
        """Load an exported folder.

        Args:
            folder: what ``sm_train.export`` wrote, or a hub repository of it.
            dtype: of the LLM: float32, bfloat16 or float16; None for what the folder was exported with.
            device: auto, cpu, cuda or cuda:N.
            device_map: auto spreads the LLM's layers over the GPUs of one node.
            speech_encoder, llm: where the frozen models lie, if no longer where the folder says.
            trust_remote_code, adapter_kwargs, _from_auto: what AutoModel passes to every class; they mean nothing here.

        Raises:
            UserError: the folder is damaged, or a frozen model is not there or is another one.
        """
        root = open_folder(folder, revision)
        config = config or SpeechLlmConfig.from_pretrained(root)
        named = None if dtype is None else str(dtype).removeprefix("torch.")
        if named not in (None, *DTYPES):
            raise UserError(f"dtype is {named!r}; it must be one of {', '.join(DTYPES)}")
        asked = config.llm_config(root, llm, named, str(device), device_map)
        there = checkpoints.fingerprint(checkpoints.resolve(asked.path, asked.revision, "LLM"))
        require_same({"hash": config.llm["hash"]}, {"hash": there}, f"LLM {asked.path}", _REMEDY.format("llm"))
        encoder = _encoder(config, root, speech_encoder, str(device))
        trained = mappers.read(root, root / MAPPER)
        frozen = FrozenLlm(asked)
        wanted = {"tokenizer_hash": config.targets["tokenizer_hash"]}
        same_tokenizer = {"tokenizer_hash": tokenizer_hash(frozen.tokenizer)}
        require_same(wanted, same_tokenizer, f"LLM {asked.path}", _REMEDY.format("llm"))
        trained.require_template(frozen, _REMEDY.format("llm"))
        mapped = trained.as_system(read_targets(root, config.targets), config.trim, frozen.device)
        model = cls(config, _processor(config, root), encoder, mapped, frozen)
        model.generation_config.max_new_tokens = GenerationConfig.from_pretrained(root).max_new_tokens
        return model

    @property
    def has_adapter(self) -> bool:
        """Whether the LLM answers with a low-rank adapter that was trained with the mapper."""
        return self._mapped.adapter is not None

    @overload
    def generate(
        self, audio: Audio, prompt: str, *, sampling_rate: int | None = None, max_new_tokens: int | None = None
    ) -> str: ...

    @overload
    def generate(
        self, audio: Sequence[tuple[Audio, str]], *, sampling_rate: int | None = None, max_new_tokens: int | None = None
    ) -> list[str]: ...

    def generate(
        self, audio: Audio | Sequence[tuple[Audio, str]], prompt: str | None = None, *,
        sampling_rate: int | None = None, max_new_tokens: int | None = None,
    ) -> str | list[str]:  # fmt: skip
        """The LLM's greedy answer to a prompt about a recording; of a list of pairs, all answers as one batch.

        Args:
            audio: a file, or samples [S] or [S, channels] in [-1, 1]; or (audio, prompt) pairs.
            prompt: it stands behind the speech, unless its ``{speech}`` says where.
            sampling_rate: in Hz, of recordings given as arrays.
            max_new_tokens: the longest answer; None for what the folder was exported with.

        Raises:
            UserError: a recording or a prompt cannot be used.
        """
        pairs, is_one = _pairs(audio, prompt)
        most = self.generation_config.max_new_tokens if max_new_tokens is None else max_new_tokens
        if most < 1:
            raise UserError(f"max_new_tokens is {most}; it must be at least 1")
        if not pairs:
            return []
        prompts = self._prompts(pairs, sampling_rate)
        with self._frozen.adapters.at_work(self._mapped.adapter):
            texts = self._frozen.answer(prompts, most)
        return texts[0] if is_one else texts

    def prompt_embeds(self, audio: Audio, prompt: str, *, sampling_rate: int | None = None) -> Tensor:
        """The whole prompt as input embeddings of the LLM [L, D], in its dtype on the CPU: vLLM's ``prompt_embeds``.

        Raises:
            UserError: the recording or the prompt cannot be used.
        """
        return self._prompts([(audio, prompt)], sampling_rate)[0].cpu()

    def transcript(self, audio: Audio, *, sampling_rate: int | None = None) -> str:
        """What the mapper heard, as nearest tokens, without the LLM.

        Raises:
            UserError: the recording cannot be used.
        """
        return self._mapped.transcript(self._hear(self.processor.feature_extractor(audio, sampling_rate))) or ""

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> Any:
        """The LLM on prompts of :meth:`prompt_embeds`, [B, L, D], left-padded: its output, with logits [B, L, V]."""
        places = None if attention_mask is None else (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        with self._frozen.adapters.at_work(self._mapped.adapter):
            return self.llm(inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=places)

    @torch.inference_mode()
    def _prompts(self, pairs: Sequence[tuple[Audio, str]], sampling_rate: int | None) -> list[Tensor]:
        # Each recording is heard alone, as evaluation's are mapped: a batch changes no answer.
        inputs = self.processor([audio for audio, _ in pairs], [prompt for _, prompt in pairs], sampling_rate)
        ids = zip(inputs["input_features"], inputs["prefix_ids"], inputs["suffix_ids"], strict=True)
        return [
            spoken(self._frozen, prefix, suffix, self._mapped.vectors(self._hear(prepared)))
            for prepared, prefix, suffix in ids
        ]

    def _hear(self, prepared: NDArray[np.float32]) -> Heard:
        (feats_TE,) = self._encoder.encode([prepared])
        return Heard(feats_TE.astype(np.float16), "")

    def save_pretrained(self, save_directory: str | Path, **_options: Any) -> NoReturn:
        """Raises UserError: an exported folder is copied as it stands."""
        raise UserError(f"{self.config.name_or_path or 'the exported folder'} is a folder of files: copy it instead")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoReturn:
        # to(), cuda() and half() come here. They would move or round some of the parts, and not what they go by.
        raise UserError("a loaded model stays where it is: give from_pretrained(FOLDER, device=..., dtype=...) instead")


def _processor(config: SpeechLlmConfig, root: Path) -> SpeechLlmProcessor:
    processor: SpeechLlmProcessor = SpeechLlmProcessor.from_pretrained(root, trust_remote_code=False)
    wanted = {"tokenizer_hash": config.targets["tokenizer_hash"]}
    found = {"tokenizer_hash": tokenizer_hash(processor.tokenizer)}
    require_same(wanted, found, f"tokenizer of {root}", "export the run again, or copy the folder again")
    return processor


def _encoder(config: SpeechLlmConfig, root: Path, path: str | None, device: str) -> SpeechEncoder:
    asked = config.encoder_config(root, path, device)
    encoder = SpeechEncoder(asked)
    wanted = {name: config.speech_encoder[name] for name in ("weights_hash", "settings_hash")}
    found = {name: getattr(encoder, name) for name in wanted}
    require_same(wanted, found, f"speech encoder {asked.path}", _REMEDY.format("speech_encoder"))
    return encoder


def _pairs(audio: Audio | Sequence[tuple[Audio, str]], prompt: str | None) -> tuple[list[tuple[Audio, str]], bool]:
    if isinstance(audio, str | Path | np.ndarray):
        if not isinstance(prompt, str):
            raise UserError(
                f"the prompt is {prompt!r}; give generate(audio, prompt), or a list of (audio, prompt) pairs"
            )
        return [(audio, prompt)], True
    pairs = list(audio) if isinstance(audio, Sequence) else [None]
    if prompt is not None or not all(_is_pair(pair) for pair in pairs):
        raise UserError("generate takes (audio, prompt), or one list of (audio, prompt) pairs")
    return [(pair[0], str(pair[1])) for pair in pairs if pair is not None], False


def _is_pair(given: Any) -> bool:
    is_two = isinstance(given, tuple | list) and len(given) == 2
    return is_two and isinstance(given[0], str | Path | np.ndarray) and isinstance(given[1], str)
