"""Builders of tiny random checkpoints of speech encoders, with the tensor names that published ones have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.builders import save_weights, seamless

LAYERS, WIDTH = 3, 32


def _save(folder: Path, config: Any, tensors: dict[str, Any], sharded: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_weights(folder, {name: tensor.contiguous() for name, tensor in tensors.items()}, sharded)
    return folder


def _made(model_class: Any, config: Any) -> Any:
    """A model whose layers differ: at the default scale every one would be close to the identity."""
    import torch

    torch.manual_seed(1)
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "feature_extractor" not in name:
                parameter.mul_(4)
    return model


def w2v_bert(folder: Path, sharded: bool = False, prefix: str = "", **settings: Any) -> Path:
    """As facebook/w2v-bert-2.0: no prefix, and the vector of masked frames; or fine-tuned, with prefix and head."""
    import torch
    from transformers import SeamlessM4TFeatureExtractor, Wav2Vec2BertConfig, Wav2Vec2BertModel

    config = Wav2Vec2BertConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=48,
        conv_depthwise_kernel_size=7, left_max_position_embeddings=8, right_max_position_embeddings=4, **settings,
    )  # fmt: skip
    state = _made(Wav2Vec2BertModel, config).state_dict()
    assert "masked_spec_embed" in state
    SeamlessM4TFeatureExtractor(padding_value=1.0).save_pretrained(folder)
    return _save(folder, config, {prefix + k: v for k, v in state.items()} | {"lm_head.bias": torch.ones(3)}, sharded)


def whisper(folder: Path, sharded: bool = False, seconds: int = 4, **settings: Any) -> Path:
    """As openai/whisper-*: encoder and decoder under ``model.``; a window of 4 s for speed."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

    config = WhisperConfig(
        d_model=WIDTH, encoder_layers=LAYERS, encoder_attention_heads=2, encoder_ffn_dim=48, decoder_layers=1,
        decoder_attention_heads=2, decoder_ffn_dim=48, vocab_size=20, max_source_positions=50 * seconds,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, **settings,
    )  # fmt: skip
    state = _made(WhisperModel, config).state_dict()
    WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=seconds).save_pretrained(folder)
    return _save(folder, config, {f"model.{name}": tensor for name, tensor in state.items()}, sharded)


def waveform(
    folder: Path, family: str, norm: str, prefix: str = "", sharded: bool = False, masked: bool | None = None,
    **settings: Any,
) -> Path:  # fmt: skip
    """As facebook/wav2vec2-base (``group``), -large-lv60 (``layer``, stable), hubert, wavlm, data2vec-audio.

    Args:
        masked: whether the extractor gives an attention mask; by default where the norm is ``layer``.
    """
    import torch
    import transformers

    name = {"wav2vec2": "Wav2Vec2", "hubert": "Hubert", "wavlm": "WavLM", "data2vec-audio": "Data2VecAudio"}[family]
    if family != "data2vec-audio":
        settings |= {"num_conv_pos_embeddings": 16, "do_stable_layer_norm": norm == "layer"}
        settings |= {"feat_extract_norm": norm}
    config = getattr(transformers, f"{name}Config")(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=48, conv_dim=(16,) * 7,
        num_conv_pos_embedding_groups=4, conv_bias=norm == "layer", **settings,
    )  # fmt: skip
    tensors = {}
    for key, tensor in _made(getattr(transformers, f"{name}Model"), config).state_dict().items():
        old = key.replace("parametrizations.weight.original0", "weight_g")
        tensors[prefix + old.replace("parametrizations.weight.original1", "weight_v")] = tensor
    assert family == "data2vec-audio" or f"{prefix}encoder.pos_conv_embed.conv.weight_g" in tensors
    extractor = transformers.Wav2Vec2FeatureExtractor(
        do_normalize=family != "wavlm", return_attention_mask=norm == "layer" if masked is None else masked
    )
    extractor.save_pretrained(folder)
    return _save(folder, config, tensors | {"quantizer.codevectors": torch.ones(2, 3)}, sharded)


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "seamless": seamless,
    "w2v-bert": w2v_bert,
    "w2v-bert fine-tuned": lambda f: w2v_bert(
        f, True, "wav2vec2_bert.", add_adapter=True, use_intermediate_ffn_before_adapter=True
    ),
    "w2v-bert rotary": lambda f: w2v_bert(f, position_embeddings_type="rotary"),
    "whisper": whisper,
    "whisper-large": lambda f: whisper(f, True, num_mel_bins=128),
    "wav2vec2-base": lambda f: waveform(f, "wav2vec2", "group", "wav2vec2."),
    "wav2vec2-large": lambda f: waveform(f, "wav2vec2", "layer", "wav2vec2.", sharded=True, add_adapter=True),
    "hubert-base": lambda f: waveform(f, "hubert", "group"),
    "hubert-large": lambda f: waveform(f, "hubert", "layer", "hubert."),
    "wavlm-base": lambda f: waveform(f, "wavlm", "group"),
    "wavlm-large": lambda f: waveform(f, "wavlm", "layer", "wavlm."),
    "data2vec": lambda f: waveform(f, "data2vec-audio", "layer", "data2vec_audio."),
}
"""Every kind of checkpoint, by a short name."""
