from __future__ import annotations

import numpy as np
import torch

from sm_train.data import lengths


def test_a_position_is_four_stored_frames_as_the_convolutions_give_them() -> None:
    conv = torch.nn.Conv1d(1, 1, kernel_size=6, stride=2, padding=2)
    for num_frames in range(4, 40):
        found = conv(conv(torch.zeros(1, 1, num_frames))).shape[-1]
        assert lengths.num_positions(num_frames) == found
    assert lengths.num_positions(np.array([3, 4, 7, 8])).tolist() == [0, 1, 1, 2]


def test_a_last_incomplete_group_is_a_frame_of_its_own() -> None:
    assert [lengths.pooled_frames(n, 2) for n in range(6)] == [0, 1, 1, 2, 2, 3]
    assert [lengths.pooled_frames(n, 3) for n in (1, 3, 4)] == [1, 1, 2]
    assert lengths.pooled_frames(7, 1) == 7
