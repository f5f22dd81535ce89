"""Questions about utterances, and every system's answers."""

from pathlib import Path

import pytest
import torch

from sm_train.errors import UserError
from sm_train.models.llm import FrozenLlm, LlmConfig
from sm_train.prompts import PromptSet
from sm_train.records import Task
from sm_train.scoring.answers import Question, Utterances, answer_all, cut, merge, questions_about
from sm_train.scoring.kept import Kept, Work
from sm_train.scoring.scores import Hypothesis
from sm_train.scoring.systems import Heard

PROMPTS = PromptSet(
    {
        "asr": {"train": ["Copy.\n{speech}"], "held_out": ["Write.\n{speech}", "{speech}\nWrite."]},
        "st": {"train": ["{speech}\nIn {target_language}."]},
        "sqa": {"train": ["{speech}\n{question}"]},
    }
)


class Parrot:
    """A system that puts three vectors in the speech's place and has a transcript of its own."""

    name, adapter = "parrot", None

    def __init__(self, llm: FrozenLlm) -> None:
        self.llm = llm

    def vectors(self, heard: Heard) -> torch.Tensor:
        return self.llm.embed([4, 5, 6])

    def transcript(self, heard: Heard) -> str | None:
        return heard.text


@pytest.fixture(scope="module")
def utterances(shard_set: Path) -> Utterances:
    return Utterances(shard_set, ["dev"])


def tasks(utterances: Utterances) -> list[Task]:
    ids = list(utterances.by_id)[:3]
    asr = [Task(i, "asr", {}, "en", utterances.by_id[i]["text"]) for i in ids]
    st = [Task(i, "st", {}, "de", "Hallo") for i in ids]
    return [*asr, *st, Task(ids[0], "sqa", {"question": "who"}, "en", "me"), Task("another", "asr", {}, "en", "x")]


def test_questions_are_filled_and_only_about_these_utterances(utterances: Utterances) -> None:
    questions = questions_about(utterances, tasks(utterances), PROMPTS, ["train"], 0)
    assert len(questions) == 7
    assert questions[3].message == "{speech}\nIn German."
    assert questions[6].message == "{speech}\nwho"


def test_every_group_and_every_paraphrase(utterances: Utterances) -> None:
    asr = tasks(utterances)[:3]
    both = questions_about(utterances, asr, PROMPTS, ["train", "held_out"], 0)
    assert [q.group for q in both] == 3 * ["train"] + 3 * ["held_out"]
    assert [q.task for q in both] == [*asr, *asr]
    every = questions_about(utterances, asr, PROMPTS, ["held_out"], 0, "all")
    assert [(q.task, q.message) for q in every] == [(t, m) for t in asr for m in PROMPTS.of("asr", "held_out")]


def test_no_task_about_the_split_is_an_error(utterances: Utterances) -> None:
    with pytest.raises(UserError, match="no task about the utterances"):
        questions_about(utterances, [Task("another", "asr", {}, "en", "x")], PROMPTS, ["train"], 0)


def test_a_split_that_is_not_there_is_named(shard_set: Path) -> None:
    with pytest.raises(UserError, match="no utterance in split 'nowhere'"):
        Utterances(shard_set, ["dev", "nowhere"])


@pytest.fixture(scope="module")
def llm(llm_folder: Path) -> FrozenLlm:
    return FrozenLlm(LlmConfig(str(llm_folder), device="cpu"))


def answers(
    utterances: Utterances, llm: FrozenLlm, questions: list[Question], folder: Path, batch_size: int, ranks: int = 1
) -> tuple[list[Hypothesis], Work]:
    kept = Kept(folder, {})
    for rank in range(ranks):
        answer_all([Parrot(llm)], llm, utterances, questions, 5, batch_size, Kept(folder, {}, rank), (rank, ranks))
    hypotheses, work = merge([Parrot(llm)], utterances, questions, batch_size, kept)
    return hypotheses, work["parrot"]


def test_every_question_is_answered_in_order_whatever_the_batch(
    utterances: Utterances, llm: FrozenLlm, tmp_path: Path
) -> None:
    questions = questions_about(utterances, tasks(utterances), PROMPTS, ["train"], 0)
    one, work = answers(utterances, llm, questions, tmp_path / "one", batch_size=1)
    many, same = answers(utterances, llm, questions, tmp_path / "many", batch_size=4)
    assert one == many
    assert [h.id for h in one[:7]] == [q.task.utterance_id for q in questions]
    alone = [h for h in one if h.system == "parrot, no LLM"]
    assert [h.hypothesis for h in alone] == [h.reference for h in alone]
    assert len(alone) == 3
    halves = [llm.chat.halves(q.message) for q in questions]
    assert work.prompt_tokens == sum(len(prefix) + 3 + len(suffix) for prefix, suffix in halves)
    assert work.speech_positions == 3 * len(questions)
    assert len(questions) <= work.answer_tokens <= 5 * len(questions)
    assert (work.prompt_tokens, work.answer_tokens) == (same.prompt_tokens, same.answer_tokens)


def test_pieces_hold_every_question_once_and_batches_one_kind(utterances: Utterances) -> None:
    questions = questions_about(utterances, tasks(utterances), PROMPTS, ["train"], 0)
    pieces = cut(utterances, questions, 1)
    assert [len(piece) for piece in pieces] == [4, 3]
    assert sorted(i for piece in pieces for batch in piece for i in batch) == list(range(7))
    (piece,) = cut(utterances, questions, 3)
    assert [[questions[i].task.task for i in batch] for batch in piece] == [3 * ["asr"], ["sqa", "st", "st"], ["st"]]
    frames = {row["ordinal"]: row["num_frames"] for row in utterances.rows}
    lengths = [frames[questions[i].ordinal] for i in piece[0]]
    assert lengths == sorted(lengths)


def test_two_ranks_answer_what_one_does_and_nothing_twice(
    utterances: Utterances, llm: FrozenLlm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = questions_about(utterances, tasks(utterances), PROMPTS, ["train"], 0)
    one, _ = answers(utterances, llm, questions, tmp_path / "one", batch_size=1)
    two, _ = answers(utterances, llm, questions, tmp_path / "two", batch_size=1, ranks=2)
    assert two == one
    assert {path.name.split("-")[0] for path in (tmp_path / "two").rglob("*.jsonl")} == {"rank0", "rank1"}
    monkeypatch.setattr(Parrot, "vectors", None)  # all is kept: no system is asked again
    again, _ = answers(utterances, llm, questions, tmp_path / "two", batch_size=1)
    assert again == one
