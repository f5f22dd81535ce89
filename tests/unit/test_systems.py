"""What each system puts in the speech's place."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from sm_train import files
from sm_train.data.target_set import TargetSet
from sm_train.errors import UserError
from sm_train.models.llm import FrozenLlm, LlmConfig
from sm_train.models.mapper import MapperConfig, SpeechMapper
from sm_train.models.speech import CtcHead
from sm_train.scoring import mappers, systems
from sm_train.scoring.mappers import Trained
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
    systems.ask(llm, ["say\n{speech}\nagain"], [vectors_ND], 5, None)
    (prompt,) = seen
    at = (prompt == 7.0).all(dim=1).nonzero().flatten().tolist()
    assert len(at) == 2
    assert 0 < at[0] < at[1] < len(prompt) - 1


def trained(run: Path, **contract: object) -> Trained:
    """A checkpoint that has a contract and no weights."""
    step = run / "checkpoints" / "step-1"
    files.write_json(step / "state.json", {"global_step": 1, "contract": contract})
    return mappers.read(run, step)


def tuned(run: Path, tasks: dict[str, float], sigma: float = 0.0, **contract: object) -> Trained:
    of_run = {"stage": "tune", "tasks": tasks, "objective.sigma": sigma, "mapper_hash": "a", **contract}
    return trained(run, **of_run)


@pytest.mark.parametrize(
    ("tasks", "sigma", "name"),
    [
        ({"asr": 1.0}, 0.0, "stage 2 ASR-CE"),
        ({"asr": 1.0}, 0.9, "stage 2 ASR-CE+MSE"),
        ({"sqa": 0.5, "asr": 0.5}, 0.0, "stage 2 ASR/SQA-CE"),
        ({"sqa": 0.0, "st": 1.0, "asr": 0.0}, 0.0, "stage 2 ST-CE"),
        (
            {"sqa": 1.0, "st-fr": 1.0, "st-de": 1.0, "other": 1.0, "asr": 1.0},
            0.0,
            "stage 2 ASR/ST-DE/ST-FR/SQA/OTHER-CE",
        ),
    ],
)
def test_a_tuned_mapper_is_named_by_its_contract(
    tmp_path: Path, tasks: dict[str, float], sigma: float, name: str
) -> None:
    assert tuned(tmp_path, tasks, sigma).name == name


def test_a_mapper_of_stage_1_is_named_so(tmp_path: Path) -> None:
    assert trained(tmp_path, layer=2).name == "stage 1"


def test_names_that_are_shared_say_the_run(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("one", "a/two", "b/two", "a/three")]
    for run, sigma in zip(runs, (0.0, 0.0, 0.0, 0.5), strict=True):
        tuned(run, {"asr": 1.0}, sigma)
    steps = [(run, run / "checkpoints" / "step-1") for run in runs]
    assert [one.name for one in mappers.read_all([steps[0], steps[1], steps[3]])] == [
        "stage 2 ASR-CE (one)",
        "stage 2 ASR-CE (two)",
        "stage 2 ASR-CE+MSE",
    ]
    assert [one.name for one in mappers.read_all(steps[:3])] == [
        "stage 2 ASR-CE (one)",
        f"stage 2 ASR-CE ({runs[1]})",
        f"stage 2 ASR-CE ({runs[2]})",
    ]
    with pytest.raises(UserError, match="evaluated twice"):
        mappers.read_all([steps[0], (runs[0] / ".." / "one", steps[0][1])])


@pytest.mark.parametrize(("stage", "trim"), [({}, "change_point"), ({"stage": "tune"}, "none")])
def test_a_tuned_mapper_is_heard_whole(
    tmp_path: Path, targets: TargetSet, monkeypatch: pytest.MonkeyPatch, stage: dict[str, str], trim: str
) -> None:
    oracle = Oracle(targets.rows_RD.float()[[*other_rows(targets), targets.pad_row]])
    monkeypatch.setattr(SpeechMapper, "from_pretrained", lambda _folder: oracle)
    one = trained(tmp_path, **{"tasks": {"asr": 1.0}, "objective.sigma": 0.0, **stage})
    system = one.as_system(targets, "change_point", torch.device("cpu"))
    assert (system.trim, system.name) == (trim, one.name)
    assert len(system.vectors(heard(4))) == (4 if stage else 3)


@pytest.mark.parametrize("field", ["encoder_hash", "layer", "pool", "tokenizer_hash", "pad_id"])
def test_another_frozen_model_is_refused(tmp_path: Path, field: str) -> None:
    here = {"encoder_hash": "e", "layer": 2, "pool": 1, "tokenizer_hash": "t", "pad_id": 0, "seed": 1}
    tuned(tmp_path, {"asr": 1.0}, **{**here, "seed": 2}).require_frozen(here)
    with pytest.raises(UserError, match=f"{field} is 'other' there"):
        tuned(tmp_path, {"asr": 1.0}, **{**here, field: "other"}).require_frozen(here)


MESSAGES = ("Say.\n{speech}", "{speech}\nIn {target_language}: what?")


def test_another_template_is_refused(tmp_path: Path, llm: FrozenLlm) -> None:
    rendered = {f"rendered.{message}": llm.chat.halves(message) for message in MESSAGES}
    tuned(tmp_path, {"st": 1.0}, **rendered).require_template(llm, "do this")
    prefix, suffix = rendered[f"rendered.{MESSAGES[1]}"]
    rendered[f"rendered.{MESSAGES[1]}"] = (prefix, [*suffix, 5])
    with pytest.raises(UserError, match=r"In \{target_language\}: what.*do this") as caught:
        tuned(tmp_path, {"st": 1.0}, **rendered).require_template(llm, "do this")
    assert "\n" not in str(caught.value)
    trained(tmp_path, layer=2).require_template(llm, "do this")
