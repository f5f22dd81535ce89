"""The bench of resume: its synthetic set is a real one, and a resumed process gives every part's time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sm_train.data.batches import SpeechItems
from sm_train.data.target_set import TargetSet
from sm_train.errors import UserError
from tools.bench import resume


def test_every_row_of_the_set_can_be_read_though_few_samples_stand_on_disk(tmp_path: Path) -> None:
    shard_set = resume.make_set(tmp_path / "set", 150, encoder_width=8, llm_width=6)
    items = SpeechItems(shard_set, TargetSet(shard_set, resume.TARGET), ["train"])
    assert len(set(items.ids)) == 150
    batch = items.collate(np.array([3, 3 + resume.SAMPLES, 149]))
    assert batch.ordinals.tolist() == [3, 3 + resume.SAMPLES, 149]
    assert batch.num_frames_B.tolist() == items.lengths[[3, 3 + resume.SAMPLES, 149]].tolist()
    assert batch.feats_BTE[0].equal(batch.feats_BTE[1])


def test_a_resumed_process_gives_the_time_of_every_part(tmp_path: Path) -> None:
    (found,) = resume.latency(resume.BenchConfig(repeats=1), tmp_path, 200)
    assert set(found) == {"imports", "main() to first step", *resume.PARTS}
    assert 0 < sum(found[part] for part in resume.PARTS) <= found["main() to first step"]


def test_a_person_s_mistakes() -> None:
    for argv, message in ((["latency"], "key=value"), (["show=fast"], "show is 'fast'"), (["repeats=0"], "repeats")):
        with pytest.raises(UserError, match=message):
            resume.main(argv)
