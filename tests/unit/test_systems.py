"""What each system puts in the speech's place."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from sm_train.data.target_set import TargetSet
from sm_train.errors import UserError
from sm_train.models.llm import FrozenLlm, LlmConfig
from sm_train.models.mapper import MapperConfig, SpeechMapper
from sm_train.models.speech import CtcHead
from sm_train.scoring import systems
from sm_train.scoring.systems import Cascade, Heard, Mapped, Topline


@pytest.fixture(scope="module")
def llm(llm_folder: Path) -> FrozenLlm:
    return FrozenLlm(LlmConfig(str(llm_folder), device="cpu"))


@pytest.fixture(scope="module")
def targets(shard_set: Path) -> TargetSet:
    return TargetSet(shard_set, next((shard_set / "targets").iterdir()).name)


class Oracle(SpeechMapper):
    """A mapper that says given rows of the table, whatever it hears."""

    def __init__(self, vectors_PD: torch.Tensor) -> None:
        super().__init__(MapperConfig(widths=[8, 8, 8], layers=1, heads=2, feed_forward=8), 8, vectors_PD.shape[1])
        self.vectors_PD = vectors_PD

    def forward(self, feats_BTE: torch.Tensor, num_frames_B: torch.Tensor) -> torch.Tensor:
        return self.vectors_PD[None]


def mapped(targets: TargetSet, rows: list[int], trim: str = "change_point") -> Mapped:
    return Mapped(Oracle(targets.rows_RD.float()[rows]), targets, trim, torch.device("cpu"), "oracle")


def heard(num_positions: int) -> Heard:
    return Heard(np.zeros((4 * num_positions, 8), np.float16), "")


def other_rows(targets: TargetSet) -> list[int]:
    return [row for row in range(len(targets.token_ids)) if row != targets.pad_row][:3]


def test_mapped_speech_is_trimmed_where_the_pads_begin(targets: TargetSet) -> None:
    words = other_rows(targets)
    system = mapped(targets, [*words, targets.pad_row, targets.pad_row])
    assert torch.equal(system.vectors(heard(5)), targets.rows_RD.float()[words])


def test_untrimmed_speech_keeps_its_pads(targets: TargetSet) -> None:
    system = mapped(targets, [*other_rows(targets), targets.pad_row], trim="none")
    assert len(system.vectors(heard(4))) == 4


def test_positions_beyond_the_speech_are_left_out(targets: TargetSet) -> None:
    assert len(mapped(targets, other_rows(targets)).positions(heard(2))) == 2


def test_the_transcript_is_the_nearest_tokens(targets: TargetSet) -> None:
    words = other_rows(targets)
    said = mapped(targets, [*words, targets.pad_row]).transcript(heard(4))
    assert said == targets.text(np.array(words))


def test_topline_normalises_and_embeds_the_reference(llm: FrozenLlm) -> None:
    one = Topline(llm, "mms").vectors(Heard(np.zeros((4, 8), np.float16), "The CAT!"))
    other = Topline(llm, "mms").vectors(Heard(np.zeros((4, 8), np.float16), "the cat"))
    assert torch.equal(one, other)


def test_ctc_collapses_repeats_and_blanks(tmp_path: Path, llm: FrozenLlm) -> None:
    characters = ["<blank>", " ", "a", "b"]
    save_file(
        {"weight": np.eye(4, dtype=np.float32), "bias": np.zeros(4, np.float32)}, tmp_path / "ctc_head.safetensors"
    )
    (tmp_path / "ctc_vocabulary.json").write_text(json.dumps(characters))
    path = [2, 2, 0, 2, 3, 1, 1, 0, 1, 3, 3]
    feats_TE = np.eye(4, dtype=np.float16)[path]
    system = Cascade(llm, CtcHead(tmp_path))
    assert system.transcript(Heard(feats_TE, "")) == "aab b"


def test_a_missing_ctc_head_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="set cascade: null"):
        CtcHead(tmp_path)


def test_vectors_stand_where_the_speech_stands(llm: FrozenLlm, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(llm, "answer", lambda prompts, _n: seen.extend(prompts) or ["ok"] * len(prompts))
    vectors_ND = torch.full((2, llm.embeddings.weight.shape[1]), 7.0)
    systems.ask(llm, ["say {speech} again"], [vectors_ND], 5)
    (prompt,) = seen
    at = (prompt == 7.0).all(dim=1).nonzero().flatten().tolist()
    assert len(at) == 2
    assert 0 < at[0] < at[1] < len(prompt) - 1
