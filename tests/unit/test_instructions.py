"""Instructions as items: which an epoch holds, what they cost, how they are asked, and the rows they become."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sm_train.chat import Chat
from sm_train.data import instructions
from sm_train.data.batches import Columns, SpeechItems
from sm_train.data.instructions import IGNORED, InstructionItems
from sm_train.data.lengths import num_positions
from sm_train.data.loader import Loader, plan_items
from sm_train.data.plan import Position
from sm_train.data.target_set import TargetSet
from sm_train.errors import UserError
from sm_train.models import tasks
from sm_train.models.tokenizer import Tokenizer
from sm_train.prompts import PromptSet
from tests import tuning

MIXED = {"asr": 1.0, "st-fr": 0.7, "sqa": 0.4}


@pytest.fixture(scope="module")
def root(shard_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the session's set, with tasks."""
    folder = tmp_path_factory.mktemp("instructions")
    shutil.copytree(shard_set, folder / "set")
    tasks.build(folder / "set", tuning.TARGET, [tuning.instructions(folder / "tasks.jsonl", folder / "set")])
    return folder / "set"


@pytest.fixture(scope="module")
def chat(llm_folder: Path) -> Chat:
    return Chat(Tokenizer(llm_folder, None).inner)


@pytest.fixture(scope="module")
def speech(root: Path) -> SpeechItems:
    return SpeechItems(root, TargetSet(root, tuning.TARGET), ["train"])


@pytest.fixture
def make(speech: SpeechItems, chat: Chat) -> Any:
    """Makes the items of a mixture."""
    return lambda weights=MIXED, **settings: InstructionItems(speech, chat, tuning.mixture(weights, **settings))


def kind(items: InstructionItems, item: int) -> str:
    task = items.tasks[item]
    return f"st-{task.target_lang}" if task.task == "st" else task.task


def of_kinds(items: InstructionItems, epoch: int) -> dict[str, list[int]]:
    """The items of an epoch, by kind, in order."""
    found: dict[str, list[int]] = {}
    for item in items.of_epoch(epoch).tolist():
        found.setdefault(kind(items, item), []).append(item)
    return found


# ---- which items there are, and which an epoch holds


def test_items_are_the_tasks_of_the_split_that_the_mixture_names(make: Any, root: Path, speech: SpeechItems) -> None:
    items = make({"sqa": 1.0, "st-de": 2.0})
    rows = pq.read_table(root / "targets/tiny/tasks.parquet").to_pylist()
    train = set(speech.ids)
    wanted = [r for r in rows if r["id"] in train and (r["task"] == "sqa" or r["target_lang"] == "de")]
    assert len(train) < 30
    assert [(task.utterance_id, task.task, task.answer) for task in items.tasks] == [
        (r["id"], r["task"], r["answer"]) for r in wanted
    ]
    assert items.answers == [r["answer_ids"] for r in wanted]
    assert [speech.ids[i] for i in items.speech_items] == [r["id"] for r in wanted]
    assert items.kinds == ["sqa", "st"]
    assert items.ids[0] == f"{wanted[0]['id']} ({wanted[0]['task']}-{wanted[0]['target_lang']})"
    assert items.tasks[[task.task for task in items.tasks].index("sqa")].variables["question"].startswith("what is")
    for name in ("num_frames", "num_tokens"):
        assert items.columns[name].tolist() == speech.columns[name][items.speech_items].tolist()
    assert items.columns["num_answer_tokens"].tolist() == [r["num_answer_tokens"] for r in wanted]
    assert items.duration_s.tolist() == speech.duration_s[items.speech_items].tolist()


def test_st_is_every_language_and_st_with_a_language_is_that_one(make: Any) -> None:
    assert {kind(items, i) for items in [make({"st": 1.0})] for i in range(len(items))} == {"st-fr", "st-de"}
    assert {kind(items, i) for items in [make({"st-fr": 1.0})] for i in range(len(items))} == {"st-fr"}


@pytest.mark.parametrize("weights", [MIXED, {"asr": 0.2, "sqa": 3.0}, {"st-de": 5, "st-fr": 1, "asr": 2, "sqa": 0.1}])
def test_shares_hold_to_one_item_and_the_scarcest_ends_the_epoch(make: Any, weights: Mapping[str, float]) -> None:
    items = make(weights)
    whole = {name: sum(kind(items, i) == name for i in range(len(items))) for name in weights}
    total = min(whole[name] / weights[name] for name in weights) * sum(weights.values())
    for epoch in range(5):
        found = of_kinds(items, epoch)
        assert set(found) == set(weights)
        for name, weight in weights.items():
            assert abs(len(found[name]) - total * weight / sum(weights.values())) < 1
        assert any(len(found[name]) == whole[name] for name in weights)


def test_no_item_comes_again_before_its_group_is_through(make: Any) -> None:
    items = make()
    streams: dict[str, list[int]] = {}
    for epoch in range(7):
        for name, found in of_kinds(items, epoch).items():
            streams.setdefault(name, []).extend(found)
    for name, stream in streams.items():
        group = [i for i in range(len(items)) if kind(items, i) == name]
        rounds = [stream[at : at + len(group)] for at in range(0, len(stream), len(group))]
        assert len(rounds) > 2
        for one in rounds[:-1]:
            assert sorted(one) == group
        assert len(set(rounds[-1])) == len(rounds[-1])
        assert len({tuple(one) for one in rounds[:-1]}) == len(rounds) - 1  # each in an order of its own


def test_of_one_kind_every_epoch_has_each_item_once(make: Any) -> None:
    items = make({"asr": 0.3})
    for epoch in range(3):
        assert sorted(items.of_epoch(epoch).tolist()) == list(range(len(items)))


def test_an_epoch_follows_from_seed_and_epoch_alone(make: Any) -> None:
    items = make(seed=3)
    first = [items.of_epoch(epoch).tolist() for epoch in range(4)]
    np.random.seed(7)
    again = make(seed=3)
    assert [again.of_epoch(epoch).tolist() for epoch in (3, 0, 2, 1)] == [first[epoch] for epoch in (3, 0, 2, 1)]
    assert first[0] != first[1]
    assert make(seed=4).of_epoch(0).tolist() != first[0]


def test_weights_are_relative(make: Any) -> None:
    doubled = {name: 2 * weight for name, weight in MIXED.items()}
    assert make(doubled).of_epoch(1).tolist() == make().of_epoch(1).tolist()


# ---- how they are asked


def test_the_wording_follows_from_seed_epoch_and_item(make: Any) -> None:
    items = make()
    told = [[items.message(i, epoch) for i in range(len(items))] for epoch in range(6)]
    again = make()
    assert [[again.message(i, epoch) for i in range(len(items))] for epoch in range(6)] == told
    assert all(told[epoch] != told[0] for epoch in range(1, 6))
    assert [make(seed=1).message(i, 0) for i in range(len(items))] != told[0]
    for i in range(len(items)):
        assert {told[epoch][i] for epoch in range(6)} <= set(items.messages(i))
    asr = [i for i in range(len(items)) if kind(items, i) == "asr"]
    assert {told[0][i] for i in asr} == set(tuning.PROMPTS["asr"]["train"])  # not one wording for a whole epoch
    several = [i for i in range(len(items)) if len(items.messages(i)) > 1]
    assert np.mean([len({told[epoch][i] for epoch in range(6)}) > 1 for i in several]) > 0.8


def test_a_wording_has_its_task_s_variables(make: Any) -> None:
    items = make()
    for i, task in enumerate(items.tasks):
        for message in items.messages(i):
            assert message.count("{speech}") == 1
            assert message.count("{") == 1
            assert task.variables.get("question", "") in message
            assert ("French" in message) == (task.task == "st")


def test_held_out_wordings_are_another_group(make: Any) -> None:
    assert make({"asr": 1.0}, group="held_out").messages(0) == ["Write it.\n{speech}"]
    with pytest.raises(UserError, match="no held_out prompts for the task 'sqa'"):
        make({"sqa": 1.0}, group="held_out")


# ---- what they cost


def real_sizes(items: InstructionItems, epoch: int) -> np.ndarray:
    """Tokens of each item's row in an epoch, read alone."""
    return np.array([items.collate(np.array([i]), epoch).ids_BL.shape[1] for i in range(len(items))])


def test_lengths_bound_the_rows_of_every_epoch_and_are_reached(make: Any) -> None:
    items = make()
    sizes = np.array([real_sizes(items, epoch) for epoch in range(6)])
    assert (sizes <= items.lengths).all()
    assert np.ptp(sizes, axis=0).max() > 0
    assert (sizes.max(axis=0) == items.lengths).mean() > 0.9
    once = [i for i in range(len(items)) if len(items.messages(i)) == 1]
    assert once
    assert (sizes[:, once] == items.lengths[once]).all()


def test_a_budget_in_tokens_is_kept_by_what_is_fed(make: Any) -> None:
    items = make()
    loader = Loader(items, counts, plan_items(items, 0, 250, 2), 0, 1)
    sizes = [
        batch.ids_BL.numel() for step in itertools.islice(loader.steps(Position(0, 0)), 12) for _, batch in step.batches
    ]
    assert max(sizes) <= 250
    assert np.mean(sizes) > 100


def test_a_budget_in_samples_is_a_number_of_items(make: Any) -> None:
    items = make(unit="samples")
    assert (items.unit, set(items.lengths.tolist())) == ("samples", {1})
    loader = Loader(items, counts, plan_items(items, 0, 5, 2), 0, 1)
    sizes = [
        len(batch.ids_BL) for step in itertools.islice(loader.steps(Position(0, 0)), 8) for _, batch in step.batches
    ]
    assert max(sizes) == 5
    assert np.mean(sizes) > 3
    assert make().unit == "tokens"


def counts(columns: Columns) -> Columns:
    return {"ce": columns["num_answer_tokens"], "frames": columns["num_frames"]}


def test_a_loader_s_steps_are_the_items_of_the_epoch_with_their_counts(make: Any) -> None:
    items = make()
    loader = Loader(items, counts, plan_items(items, 0, 250, 2), 0, 1)
    ordinals: dict[int, list[int]] = {}
    for step in itertools.islice(loader.steps(Position(0, 0)), 20):
        batches = [batch for _, batch in step.batches]
        assert step.counts["ce"] == sum(int((b.answer_ids_BA != IGNORED).sum()) for b in batches)
        assert step.counts["frames"] == sum(int(b.speech.num_frames_B.sum()) for b in batches)
        for batch in batches:
            ordinals.setdefault(step.position.epoch, []).extend(batch.speech.ordinals.tolist())
    assert {0, 1} < set(ordinals)
    for epoch in (0, 1):
        chosen = items.speech.ordinals[items.speech_items[items.of_epoch(epoch)]]
        assert sorted(ordinals[epoch]) == sorted(chosen.tolist())


# ---- the rows


def test_a_row_is_prefix_speech_suffix_and_answer_left_padded(make: Any, chat: Chat) -> None:
    items = make()
    by_length = np.argsort(items.lengths, kind="stable")
    chosen = np.array([by_length[3], by_length[-1], by_length[0], by_length[len(by_length) // 2]])
    batch = items.collate(chosen, 2)
    rows, longest = [], 0
    for i in chosen:
        prefix, suffix = chat.halves(items.message(int(i), 2))
        count = int(num_positions(items.columns["num_frames"][i]))
        rows.append((prefix, count, suffix, items.answers[i]))
        longest = max(longest, len(prefix) + count + len(suffix) + len(items.answers[i]) - 1)
    sizes = [len(p) + count + len(s) + len(a) - 1 for p, count, s, a in rows]
    assert len(set(sizes)) > 2
    assert batch.ids_BL.shape == batch.is_speech_BL.shape == batch.is_real_BL.shape == (4, longest)
    assert (batch.ids_BL.dtype, batch.answer_ids_BA.dtype) == (torch.int64, torch.int64)
    assert (batch.is_speech_BL.dtype, batch.is_real_BL.dtype) == (torch.bool, torch.bool)
    for b, (prefix, count, suffix, answer) in enumerate(rows):
        pads = longest - sizes[b]
        assert batch.is_real_BL[b].tolist() == [False] * pads + [True] * sizes[b]
        begin = pads + len(prefix)
        assert batch.is_speech_BL[b].nonzero().flatten().tolist() == list(range(begin, begin + count))
        assert batch.ids_BL[b, pads:begin].tolist() == prefix
        assert batch.ids_BL[b, begin + count :].tolist() == suffix + answer[:-1]
        beyond = batch.answer_ids_BA.shape[1] - len(answer)
        assert batch.answer_ids_BA[b].tolist() == [IGNORED] * beyond + answer
        assert answer[-1] == chat.end_id
    assert int(batch.ids_BL.min()) >= 0
    assert batch.answer_ids_BA.shape[1] == max(len(answer) for *_, answer in rows)
    alone = items.speech.collate(items.speech_items[chosen])
    assert torch.equal(batch.speech.feats_BTE, alone.feats_BTE)
    assert batch.speech.ordinals.tolist() == items.speech.ordinals[items.speech_items[chosen]].tolist()


def test_a_prompt_that_begins_with_speech_has_a_row_where_there_is_no_bos(tmp_path: Path) -> None:
    """Qwen without its template: no token stands before the speech."""
    world = tuning.small(tmp_path, "qwen2")
    world.chat.tokenizer.chat_template = None
    chat, root = Chat(world.chat.tokenizer), world.targets.root
    facts = {**instructions.tasks_facts(root), "chat": chat.fingerprint}
    instructions.write_tasks(root, pq.read_table(root / instructions.TASKS).to_pylist(), facts)
    prompts = PromptSet({"asr": {"train": ["{speech}\nSay it again."]}})
    items = InstructionItems(world.items.speech, chat, tuning.mixture({"asr": 1.0}, prompts=prompts))
    assert chat.halves(items.message(0, 0))[0] == []
    batch = items.collate(np.arange(2), 0)
    assert batch.is_speech_BL.sum(dim=1).tolist() == num_positions(items.columns["num_frames"][:2]).tolist()


# ---- mistakes


def refused(make: Any, *parts: str, **settings: Any) -> None:
    """Making the items is one line that holds some parts."""
    with pytest.raises(UserError) as caught:
        make(**settings)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert re.search(part, str(caught.value)), (part, str(caught.value))


def test_a_kind_that_no_task_has_is_refused(make: Any) -> None:
    has = "about utterances of train; it has: asr, sqa, st, st-de, st-fr"
    refused(make, "no task 'st-xx'", has, weights={"asr": 1.0, "st-xx": 1.0, "sqa": 1.0})
    refused(make, "no task 'st-xx'", has, weights={"st-xx": 1.0})


def test_answers_that_are_too_long_are_counted_and_the_longest_is_named(make: Any) -> None:
    items = make()
    sizes = items.columns["num_answer_tokens"]
    limit, longest = int(sizes.max()) - 2, items.ids[int(sizes.argmax())]
    over = int((sizes > limit).sum())
    assert 1 < over < len(items)
    refused(make, f"{over} answers have more than max_answer_tokens {limit}; the longest, of {re.escape(longest)}, has "
            f"{sizes.max()}: raise max_answer_tokens or leave them out", max_answer_tokens=limit)  # fmt: skip
    make(max_answer_tokens=int(sizes.max()))


@pytest.mark.parametrize("unit", ["tokens", "samples"])
def test_a_prompt_whose_variable_a_task_lacks_is_refused_before_training(make: Any, unit: str) -> None:
    prompts = PromptSet({"asr": {"train": ["Repeat.\n{speech}", "{speech}\nin {tone}"]}})
    refused(make, r"no value for \{tone\}", weights={"asr": 1.0}, prompts=prompts, unit=unit)


def test_a_target_set_without_tasks_names_the_command(root: Path, chat: Chat, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(root, tmp_path / "set"))
    (bare / "targets/tiny/tasks.parquet").unlink()
    speech = SpeechItems(bare, TargetSet(bare, tuning.TARGET), ["train"])
    command = f"write them: python -m cluster.retarget {bare} --name tiny --instructions FILE"
    with pytest.raises(UserError, match=f"target set {bare}/targets/tiny has no tasks; {command}"):
        InstructionItems(speech, chat, tuning.mixture(MIXED))


def test_tasks_of_another_template_name_both_and_the_command(speech: SpeechItems, llm_folder: Path) -> None:
    tokenizer = Tokenizer(llm_folder, None).inner
    own = Chat(tokenizer).fingerprint
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    other = Chat(tokenizer)
    with pytest.raises(UserError, match=f"another chat template \\({own}\\) than this LLM's \\({other.fingerprint}\\); "
                       "name that LLM, or write them again: python -m cluster.retarget"):  # fmt: skip
        InstructionItems(speech, other, tuning.mixture(MIXED))


def test_the_digest_is_the_tasks_file_s(make: Any, root: Path, tmp_path: Path, chat: Chat) -> None:
    other = Path(shutil.copytree(root, tmp_path / "set"))
    target_set = TargetSet(other, tuning.TARGET)
    rows = pq.read_table(target_set.root / "tasks.parquet").to_pylist()
    speech = SpeechItems(other, target_set, ["train"])
    items = InstructionItems(speech, chat, tuning.mixture(MIXED))
    assert items.digest == make().digest
    instructions.write_tasks(target_set.root, rows[:-1], instructions.tasks_facts(target_set.root))
    assert items.digest != make().digest
