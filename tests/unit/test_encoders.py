"""Every family of speech encoders against transformers' own whole models, on tiny random checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sm_train.data.inputs import Inputs
from sm_train.errors import UserError
from sm_train.models.speech import EncoderConfig, SpeechEncoder
from tests import builders, encoders
from tests.encoders import FAMILIES, LAYERS, WIDTH

SECONDS = (2.0, 1.1, 1.6)
WITH_GROUP_NORM = ("wav2vec2-base", "hubert-base", "wavlm-base")
UNPADDED = (*WITH_GROUP_NORM, "data2vec")


def audio(*seconds: float) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [builders.tones(rng, s) for s in seconds]


def encoder(folder: Path, layer: int = LAYERS, pool: int = 1, **choices: str) -> SpeechEncoder:
    return SpeechEncoder(EncoderConfig(path=str(folder), layer=layer, pool=pool, device="cpu", **choices))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            folders[name] = FAMILIES[name](tmp_path_factory.mktemp("encoders") / "model")
        return folders[name]

    return make


def transformers_states(folder: Path, samples_S: np.ndarray) -> list[np.ndarray]:
    """hidden_states[k] below the last, and the output of the encoder, by transformers' whole model and extractor."""
    from transformers import AutoFeatureExtractor, AutoModel

    model, loading = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    outputs: list[torch.Tensor] = []
    model.encoder.register_forward_hook(lambda _module, _args, out: outputs.append(out[0]))
    inputs = AutoFeatureExtractor.from_pretrained(folder)(samples_S, sampling_rate=16_000, return_tensors="pt")
    run = model.encoder if hasattr(model, "decoder") else model
    with torch.inference_mode():
        states = run.eval()(**inputs, output_hidden_states=True).hidden_states
    return [state[0].numpy() for state in (*states[:LAYERS], outputs[0])]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "seamless"])
def test_every_layer_is_the_one_that_transformers_gives(made: Callable[[str], Path], name: str) -> None:
    (samples_S,) = audio(1.1)
    expected = transformers_states(made(name), samples_S)
    assert len(expected) == LAYERS + 1
    for layer, expected_TE in enumerate(expected):
        mine = encoder(made(name), layer)
        (got_TE,) = mine.encode_audio([samples_S])
        assert got_TE.shape == (mine.num_frames(len(samples_S)), WIDTH) == (len(got_TE), mine.width)
        assert name.startswith("whisper") or len(got_TE) == len(expected_TE)
        # Whisper's input comes from torch there, and from transformers' own NumPy code here: 1e-6 apart.
        np.testing.assert_allclose(got_TE, expected_TE[: len(got_TE)], atol=1e-5 if name.startswith("whisper") else 0)
        if layer:
            assert np.abs(got_TE - expected[layer - 1][: len(got_TE)]).mean() > 0.05


@pytest.mark.parametrize("name", FAMILIES)
def test_an_utterance_alone_equals_itself_among_others(made: Callable[[str], Path], name: str) -> None:
    mine = encoder(made(name), pool=2)
    assert mine.equal_length == (name in UNPADDED)
    batch = audio(*SECONDS, 1.6)
    for alone, together in zip([mine.encode_audio([a])[0] for a in batch], mine.encode_audio(batch), strict=True):
        np.testing.assert_allclose(alone, together, atol=1e-4)
    assert mine.check_alone_equals_padded() < 1e-4


@pytest.mark.parametrize("name", UNPADDED)
def test_the_gate_closes_where_padding_changes_features(made: Callable[[str], Path], name: str) -> None:
    forced = encoder(made(name), batching="padded")
    short, long = audio(1.1, 2.0)
    (alone_TE,), (together_TE, _) = forced.encode_audio([short]), forced.encode_audio([short, long])
    assert np.abs(alone_TE - together_TE).max() > 1e-2
    with pytest.raises(UserError, match=r"differ by .*; set encoder.batching=equal_length"):
        forced.check_alone_equals_padded()


def test_the_gate_closes_without_the_mask_that_a_layer_norm_needs(tmp_path: Path) -> None:
    folder = encoders.waveform(tmp_path / "m", "wav2vec2", "layer", masked=False)
    with pytest.raises(UserError, match="equal_length"):
        encoder(folder).check_alone_equals_padded()
    assert encoder(folder, batching="equal_length").check_alone_equals_padded() < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_is_near_single_and_passes_the_gate(made: Callable[[str], Path], name: str, dtype: str) -> None:
    half = encoder(made(name), dtype=dtype)
    (single_TE,), (half_TE,) = encoder(made(name)).encode_audio(audio(1.1)), half.encode_audio(audio(1.1))
    assert half_TE.dtype == np.float32
    assert 0 < np.abs(single_TE - half_TE).mean() < 0.05
    half.check_alone_equals_padded()


@pytest.mark.parametrize("name", WITH_GROUP_NORM)
def test_the_gate_closes_in_half_precision_too(made: Callable[[str], Path], name: str) -> None:
    with pytest.raises(UserError, match="equal_length"):
        encoder(made(name), batching="padded", dtype="bfloat16").check_alone_equals_padded()


@pytest.mark.parametrize("name", ["seamless", "w2v-bert", "whisper", "wav2vec2-base", "hubert-large"])
@pytest.mark.parametrize("pool", [1, 2, 3])
def test_lengths_are_known_before_anything_is_encoded(made: Callable[[str], Path], name: str, pool: int) -> None:
    mine = encoder(made(name), layer=0, pool=pool)
    edge = mine.shortest_samples
    assert mine.num_frames(edge) == 4 > mine.num_frames(edge - 1)
    (samples_S,) = audio(1.4)
    for num_samples in (edge, edge + 1, *range(edge + 79, edge + 700, 80), 16_000, 22_399):
        assert len(mine.encode_audio([samples_S[:num_samples]])[0]) == mine.num_frames(num_samples), num_samples
    assert mine.frame_rate_hz == 50 / pool
    assert mine.longest_samples == (64_000 if name == "whisper" else None)


def test_whispers_longest_utterance_fills_its_window(made: Callable[[str], Path]) -> None:
    mine = encoder(made("whisper"))
    assert [len(feats) for feats in mine.encode_audio(audio(4.0, 3.99, 0.1))] == [200, 200, 5]
    with pytest.raises(ValueError, match="do not fit"):
        mine.encode_audio(audio(4.1))


def test_inputs_travel_as_text(made: Callable[[str], Path]) -> None:
    for name in ("w2v-bert", "whisper", "hubert-base"):
        mine = encoder(made(name), layer=1)
        prepared = [Inputs.from_json(mine.inputs.to_json()).prepare(a) for a in audio(1.1)]
        np.testing.assert_array_equal(mine.encode(prepared)[0], mine.encode_audio(audio(1.1))[0])


def test_lower_layers_read_fewer_weights_and_sharding_changes_none(tmp_path: Path) -> None:
    one, two = encoders.w2v_bert(tmp_path / "one"), encoders.w2v_bert(tmp_path / "two", sharded=True)
    hashes = [encoder(folder, layer).weights_hash for folder in (one, two) for layer in (1, 2, 3)]
    assert hashes[:3] == hashes[3:]
    assert len(set(hashes)) == 3


def drop(folder: Path, ending: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(ending)}
    assert len(kept) == len(tensors) - 1
    builders.save_weights(folder, kept, sharded=False)


@pytest.mark.parametrize(
    ("make", "ending", "named"),
    [
        (encoders.w2v_bert, "layers.2.final_layer_norm.weight", "'encoder.layers.2.final_layer_norm.weight'"),
        (encoders.whisper, "encoder.embed_positions.weight", "'model.encoder.embed_positions.weight'"),
        (FAMILIES["wav2vec2-base"], "conv.weight_g", "'wav2vec2.encoder.pos_conv_embed.conv.weight_g'"),
    ],
)
def test_a_missing_tensor_is_named_and_never_random(
    tmp_path: Path, make: Callable[[Path], Path], ending: str, named: str
) -> None:
    folder = make(tmp_path / "model")
    if ending.startswith("encoder."):
        ending = "model." + ending
    drop(folder, ending)
    with pytest.raises(UserError, match=f"tensor {named} is not in"):
        encoder(folder)


def test_a_window_that_does_not_fit_the_encoder_is_an_error(tmp_path: Path) -> None:
    folder = encoders.whisper(tmp_path / "m")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chunk_length": 30}))
    with pytest.raises(UserError, match="gives 3000 columns, its encoder takes 400"):
        encoder(folder)
