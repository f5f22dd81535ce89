from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from sm_train.data.lengths import num_positions
from sm_train.errors import UserError
from sm_train.models.speech import CtcHead, EncoderConfig, SpeechEncoder, mean_pool, pick_device
from tests import builders
from tests.builders import ROOT

LAYERS = 3


def audio(*seconds: float) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [builders.tones(rng, s) for s in seconds]


def encoder(folder: Path, layer: int = LAYERS, pool: int = 1, dtype: str = "float32") -> SpeechEncoder:
    return SpeechEncoder(EncoderConfig(path=str(folder), layer=layer, pool=pool, dtype=dtype, device="cpu"))


@pytest.fixture(scope="module")
def transformers_states(encoder_folder: Path) -> list[list[np.ndarray]]:
    """hidden_states[k] by transformers' own whole model: the inputs of its layers, then the output of its encoder."""
    from transformers import SeamlessM4TFeatureExtractor
    from transformers.models.seamless_m4t_v2.modeling_seamless_m4t_v2 import SeamlessM4Tv2SpeechEncoder

    model = SeamlessM4Tv2SpeechEncoder.from_pretrained(encoder_folder, key_mapping={r"^speech_encoder\.": ""}).eval()
    caught: list[torch.Tensor] = []
    for layer in model.encoder.layers:
        layer.register_forward_pre_hook(lambda _module, args: caught.append(args[0]))
    model.encoder.register_forward_hook(lambda _module, _args, out: caught.append(out))
    extractor = SeamlessM4TFeatureExtractor.from_pretrained(encoder_folder)
    inputs = extractor(audio(2.0, 1.1, 1.6), sampling_rate=16_000, return_tensors="pt")
    with torch.inference_mode():
        model(**inputs)
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    return [[state[i, :n].numpy() for i, n in enumerate(lengths)] for state in caught]


@pytest.mark.parametrize("layer", range(LAYERS + 1))
def test_every_layer_is_the_one_that_transformers_gives(
    encoder_folder: Path, transformers_states: list[list[np.ndarray]], layer: int
) -> None:
    ours = encoder(encoder_folder, layer).encode_audio(audio(2.0, 1.1, 1.6))
    assert len(transformers_states) == LAYERS + 1
    assert all(np.abs(a[0] - b[0]).mean() > 0.05 for a, b in itertools.pairwise(transformers_states))
    for mine, theirs in zip(ours, transformers_states[layer], strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_an_utterance_alone_equals_itself_in_a_padded_batch(encoder_folder: Path) -> None:
    made = encoder(encoder_folder, pool=2)
    batch = audio(1.0, 2.9, 0.4)
    for alone, together in zip([made.encode_audio([a])[0] for a in batch], made.encode_audio(batch), strict=True):
        np.testing.assert_allclose(alone, together, atol=1e-4)
        assert together.shape[1] == made.width == 32


def test_only_the_weights_in_use_are_read(encoder_folder: Path, tmp_path: Path) -> None:
    sharded = builders.seamless(tmp_path / "sharded", sharded=True)
    whole, lower = encoder(sharded), encoder(sharded, layer=1)
    assert whole.weights_hash == encoder(encoder_folder).weights_hash != lower.weights_hash
    np.testing.assert_array_equal(
        whole.encode_audio(audio(1.0))[0], encoder(encoder_folder).encode_audio(audio(1.0))[0]
    )


def test_the_shipped_sets_know_their_encoder_by_its_hash() -> None:
    """The hash in the contracts of shard sets that exist: a change would turn them away."""
    shipped = str(ROOT / "tools/miniature/weights/encoder")
    hashes = {layer: encoder(Path(shipped), layer).weights_hash for layer in (2, 4)}
    assert hashes == {2: "701e4b0e88866a5d", 4: "cbcd2e1661f0abe6"}


def test_half_precision_is_near_single(encoder_folder: Path) -> None:
    single, half = (
        encoder(encoder_folder, dtype=dtype).encode_audio(audio(1.0))[0] for dtype in ("float32", "bfloat16")
    )
    assert half.dtype == np.float32
    assert 0 < np.abs(single - half).mean() < 0.05


def test_mean_pool_averages_a_last_incomplete_group_alone() -> None:
    frames_TE = torch.arange(10.0).reshape(5, 2)
    assert mean_pool(frames_TE, 2).tolist() == [[1, 2], [5, 6], [8, 9]]
    assert mean_pool(frames_TE, 1).equal(frames_TE)


def changed(folder: Path, to: Path, **settings: object) -> Path:
    shutil.copytree(folder, to)
    path = to / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return to


def test_each_mistake_is_named(encoder_folder: Path, tmp_path: Path) -> None:
    def says(text: str, folder: Path, **choices: object) -> None:
        with pytest.raises(UserError, match=text) as error:
            SpeechEncoder(EncoderConfig(**{"path": str(folder), "layer": 1, "device": "cpu", **choices}))
        assert "\n" not in str(error.value)

    says(r"has hidden_states\[0\] to \[3\]; layer is 4", encoder_folder, layer=4)
    says(r"layer is -1", encoder_folder, layer=-1)
    says("the folder does not exist", tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    says("no config.json", tmp_path / "empty")
    says(
        "model_type is 'bert'; it must be one of seamless_m4t_v2, wav2vec2-bert, whisper, wav2vec2",
        changed(encoder_folder, tmp_path / "w", model_type="bert"),
    )
    more = changed(encoder_folder, tmp_path / "more", speech_encoder_layers=5)
    says(r"tensor 'speech_encoder.encoder.layers.3.*' is not in", more, layer=5)
    pickled = changed(encoder_folder, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    says("only safetensors weights are read", pickled)
    unmarked = changed(encoder_folder, tmp_path / "unmarked")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (unmarked / name).unlink(missing_ok=True)
    says("preprocessor_config.json", unmarked)
    slow = changed(encoder_folder, tmp_path / "slow")
    path = slow / "preprocessor_config.json"
    path.write_text(path.read_text().replace("16000", "8000"))
    says("its audio is of 8000 Hz", slow)
    path.write_text(path.read_text().replace("8000", "16000").replace('"stride": 2', '"stride": 4'))
    says("gives 25 frames a second; only 50 are known", slow)
    if not torch.cuda.is_available():
        says("torch sees no GPU", encoder_folder, device="cuda:0")
    for choice in ({"pool": 0}, {"dtype": "int8"}, {"batching": "packed"}):
        with pytest.raises(ValueError, match=next(iter(choice))):
            EncoderConfig(path="x", **choice)


def test_a_weight_index_cannot_name_a_file_outside_its_folder(tmp_path: Path) -> None:
    folder = builders.seamless(tmp_path / "sharded", sharded=True)
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00001", "../model-00001"))
    with pytest.raises(UserError, match="which is not in the folder"):
        encoder(folder)


def test_pick_device_takes_what_is_named() -> None:
    assert pick_device("cuda:1") == "cuda:1"
    assert pick_device("auto") in ("cpu", "cuda")


def test_ctc_head_drops_blanks_and_repeats(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cascade: null"):
        CtcHead(tmp_path)
    save_file(
        {"weight": np.eye(4, dtype=np.float16), "bias": np.zeros(4, np.float32)}, tmp_path / "ctc_head.safetensors"
    )
    (tmp_path / "ctc_vocabulary.json").write_text('["", "a", "b", " "]')
    feats_TE = np.eye(4)[[3, 1, 1, 0, 1, 3, 3, 2, 2, 0]]
    assert CtcHead(tmp_path).transcribe(feats_TE) == "aa b"


def test_a_last_odd_frame_is_stored_alone(encoder_folder: Path) -> None:
    single, pooled = encoder(encoder_folder), encoder(encoder_folder, pool=2)
    for num_samples in (16_000, 16_400, 16_720):
        (samples_S,) = (s[:num_samples] for s in audio(1.1))
        (frames_TE,), (pairs_TE,) = single.encode_audio([samples_S]), pooled.encode_audio([samples_S])
        assert len(frames_TE) == single.num_frames(num_samples)
        assert len(pairs_TE) == pooled.num_frames(num_samples) == -(-len(frames_TE) // 2)
        if len(frames_TE) % 2:
            np.testing.assert_array_equal(pairs_TE[-1], frames_TE[-1])
        np.testing.assert_allclose(pairs_TE[0], frames_TE[:2].mean(axis=0), atol=1e-6)
    assert {single.num_frames(n) % 2 for n in (16_000, 16_400, 16_720)} == {0, 1}
    assert (single.frame_rate_hz, pooled.frame_rate_hz) == (50.0, 25.0)


@pytest.mark.parametrize("pool", [1, 2, 3])
def test_shortest_samples_is_the_edge_of_one_position(encoder_folder: Path, pool: int) -> None:
    made = encoder(encoder_folder, pool=pool)
    edge = made.shortest_samples
    assert edge == 400 + (3 * pool * 2 + 1) * 160
    assert num_positions(made.num_frames(edge)) == 1
    assert num_positions(made.num_frames(edge - 1)) == 0
    assert made.num_frames(0) == made.num_frames(399) == 0
