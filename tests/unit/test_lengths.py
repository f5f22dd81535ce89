from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sm_train.data import lengths


def test_a_position_is_four_stored_frames_as_the_convolutions_give_them() -> None:
    conv = torch.nn.Conv1d(1, 1, kernel_size=6, stride=2, padding=2)
    for num_frames in range(4, 40):
        found = conv(conv(torch.zeros(1, 1, num_frames))).shape[-1]
        assert lengths.num_positions(num_frames) == found
    assert lengths.num_positions(np.array([3, 4, 7, 8])).tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize("pool", [1, 2, 3])
def test_shortest_samples_is_the_edge_of_one_position(pool: int) -> None:
    def positions(num_samples: int) -> int:
        return lengths.num_positions(lengths.pooled_frames(lengths.encoder_frames(num_samples), pool))

    edge = lengths.shortest_samples(pool)
    assert positions(edge) == 1
    assert positions(edge - 1) == 0


def test_encoder_frames_are_those_of_the_real_feature_extractor(encoder_folder: Path) -> None:
    from transformers import SeamlessM4TFeatureExtractor

    extractor = SeamlessM4TFeatureExtractor.from_pretrained(encoder_folder)
    for num_samples in [*range(2400, 3200, 80), 2479, 2480, 16_000, 31_999]:
        mask = extractor(np.ones(num_samples, np.float32), sampling_rate=16_000)["attention_mask"]
        assert lengths.encoder_frames(num_samples) == int(mask.sum()), num_samples
    assert lengths.encoder_frames(0) == lengths.encoder_frames(399) == 0
