"""Stage 2's objective in every family: spliced prompts are text prompts, and only the mapper learns.

Shape letters: B items, P positions, L tokens, A answer tokens, D LLM width, V vocabulary.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sm_train.data.instructions import IGNORED, InstructionItems
from sm_train.errors import UserError
from sm_train.models.llm import FrozenLlm, LlmConfig, TargetsLlm, load_model
from sm_train.models.mapper import positions_of
from sm_train.records import PromptedBatch
from sm_train.scoring import systems
from sm_train.train.objectives.instruct import InstructConfig, InstructObjective, splice
from tests.families import FAMILIES
from tests.training import relative_difference
from tests.tuning import Small, small
from tests.unit.test_families import ids_of, spoken

EPOCH = 1
UNEVEN = (3, 0, 1)

each_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A family's world in which utterances have as many positions as tokens, by its name."""
    return cache(lambda name: small(tmp_path_factory.mktemp(name), name))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A family's world in which utterances have 0 to 3 positions more than tokens."""
    return cache(lambda name: small(tmp_path_factory.mktemp(f"{name}-uneven"), name, UNEVEN))


class Fixed(nn.Module):
    """Stands where the mapper stands, and returns what it was given."""

    def __init__(self, mapped_BPD: Tensor) -> None:
        super().__init__()
        self.mapped_BPD = nn.Parameter(mapped_BPD)

    def forward(self, feats_BTE: Tensor, num_frames_B: Tensor) -> Tensor:
        return self.mapped_BPD


def some(world: Small) -> list[int]:
    """Items of every task and of very uneven lengths, the longest neither first nor last."""
    chosen = [4, 1, 0, 3, 8, 2, 10]
    assert {world.items.tasks[i].task for i in chosen} == {"asr", "st", "sqa"}
    return chosen


def collate(world: Small, items: list[int]) -> PromptedBatch:
    batch = world.items.collate(np.array(items), EPOCH)
    if len(items) > 1:
        real = batch.is_real_BL.sum(dim=1)
        assert len(set(real.tolist())) > 3
        assert len(set((batch.answer_ids_BA != IGNORED).sum(dim=1).tolist())) > 2
    return batch


def told(world: Small, batch: PromptedBatch) -> Tensor:
    """The embeddings of the transcripts' own tokens [B, P, D]; NaN beyond an item's positions."""
    mapped_BPD = world.targets.rows_RD[batch.speech.token_rows_BL].clone()
    beyond_BP = torch.arange(mapped_BPD.shape[1]) >= positions_of(batch.speech.num_frames_B)[:, None]
    return mapped_BPD.masked_fill(beyond_BP[..., None], float("nan"))


def conversation(world: Small, item: int) -> list[int]:
    """The ids of the template's own string of an item's message and its answer, up to the end of the turn."""
    task = world.items.tasks[item]
    text = world.items.speech.utterances.column("text")[int(world.items.speech_items[item])].as_py()
    ids = ids_of(world.chat.tokenizer, spoken(world.name, world.items.message(item, EPOCH), text), task.answer)
    last = len(ids) - 1 - ids[::-1].index(world.chat.end_id)
    return ids[: last + 1]


# ---- the LLM sees what it sees as text


@each_family
def test_spliced_prompts_give_the_logits_of_the_text_prompts(name: str, exact: Any) -> None:
    world = exact(name)
    batch = collate(world, some(world))
    with torch.no_grad():
        logits_BAV = world.objective().answer_logits(told(world, batch), batch)
    assert logits_BAV.shape[:2] == batch.answer_ids_BA.shape
    for b, item in enumerate(some(world)):
        ids = conversation(world, item)
        size = len(world.items.answers[item])
        with torch.no_grad():
            expected_AV = world.llm(input_ids=torch.tensor([ids])).logits[0, -1 - size : -1]
        found_AV = logits_BAV[b, -size:]
        assert float((found_AV - expected_AV).norm() / expected_AV.norm()) < 1e-5
        assert torch.allclose(found_AV, expected_AV, rtol=1e-4, atol=1e-4)


def test_the_llm_is_told_where_each_row_begins(exact: Any) -> None:
    """Places count from a row's first token, as in decoding; what rotates by relative places would not show it."""
    world = exact("llama3")
    batch, seen = collate(world, some(world)), []
    handle = world.llm.register_forward_pre_hook(lambda _m, _args, told: seen.append(told), with_kwargs=True)
    with torch.no_grad():
        world.objective().answer_logits(told(world, batch), batch)
    handle.remove()
    (given,) = seen
    assert torch.equal(given["attention_mask"], batch.is_real_BL.long())
    for b, size in enumerate(batch.is_real_BL.sum(dim=1).tolist()):
        assert given["position_ids"][b, -size:].tolist() == list(range(size))
    assert int(given["position_ids"].min()) == 0
    assert given["logits_to_keep"] == batch.answer_ids_BA.shape[1]  # no [B, L, V] is ever made
    assert given["use_cache"] is False


@pytest.mark.parametrize("kind", ["final_logit_softcapping", "attn_logit_softcapping"])
def test_gemma_2_s_soft_caps_are_on(kind: str, exact: Any) -> None:
    """Their absence would be seen: a low cap changes what the objective reads."""
    world = exact("gemma2")
    batch = collate(world, some(world))
    llm = load_model(str(world.llm_folder), None, "float32")
    assert getattr(llm.config, kind) == getattr(world.llm.config, kind) > 0
    objective = world.objective()
    with torch.no_grad():
        capped = objective.answer_logits(told(world, batch), batch)
        assert capped.abs().max() < world.llm.config.final_logit_softcapping
        setattr(llm.config, kind, 0.5)
        for layer in llm.model.layers:
            layer.self_attn.attn_logit_softcapping = llm.config.attn_logit_softcapping
        objective.llm = llm
        lower = objective.answer_logits(told(world, batch), batch)
    assert float((lower - capped).norm() / capped.norm()) > 1e-3


@each_family
def test_training_ids_are_the_ids_of_inference_and_of_the_template(
    name: str, exact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = exact(name)
    llm, fed = FrozenLlm(LlmConfig(str(world.llm_folder), device="cpu")), []
    monkeypatch.setattr(llm, "answer", lambda prompts, _n: fed.extend(prompts) or ["" for _ in prompts])
    items = some(world)
    batch = collate(world, items)
    mapped_BPD = told(world, batch)
    counts = positions_of(batch.speech.num_frames_B).tolist()
    heard = [mapped_BPD[b, :count] for b, count in enumerate(counts)]
    systems.ask(llm, [world.items.message(i, EPOCH) for i in items], heard, 5, None)
    embeds_BLD = splice(llm.embeddings(batch.ids_BL), batch.is_speech_BL, torch.cat(heard))
    for b, item in enumerate(items):
        real, place = batch.is_real_BL[b], batch.is_speech_BL[b]
        row = batch.ids_BL[b][real].tolist()
        first, answer_ids = int(place[real].nonzero()[0]), world.items.answers[item]
        begin = len(row) - (len(answer_ids) - 1)
        prefix, suffix = row[:first], row[first + counts[b] : begin]
        assert (prefix, suffix) == llm.chat.halves(world.items.message(item, EPOCH))
        assert row[begin:] == answer_ids[:-1]
        tokens = world.targets.token_ids[batch.speech.token_rows_BL[b, : counts[b]].numpy()].tolist()
        assert prefix + tokens + suffix + answer_ids == conversation(world, item)
        assert answer_ids[-1] == world.chat.end_id == llm.chat.end_id
        assert torch.equal(embeds_BLD[b][real][:begin], fed[b])


# ---- the sums


@each_family
def test_the_sums_are_those_of_each_item_by_hand(name: str, uneven: Any) -> None:
    world = uneven(name)
    items = some(world)
    batch, objective = collate(world, items), world.objective()
    with torch.no_grad():
        sums = objective(batch)
        mapped_BPD = objective.mapper(batch.speech.feats_BTE, batch.speech.num_frames_B)
    embed = world.llm.get_input_embeddings()
    cross_entropy, correct = 0.0, 0
    for b, item in enumerate(items):
        halves = [embed(torch.tensor(ids)) for ids in world.chat.halves(world.items.message(item, EPOCH))]
        answer_A = torch.tensor(world.items.answers[item])
        count = int(world.items.columns["num_frames"][item]) // 4
        embeds_LD = torch.cat([halves[0], mapped_BPD[b, :count], halves[1], embed(answer_A[:-1])])
        with torch.no_grad():
            logits_AV = world.llm(inputs_embeds=embeds_LD[None]).logits[0, -len(answer_A) :]
        chosen = logits_AV.double().log_softmax(dim=-1)[torch.arange(len(answer_A)), answer_A]
        cross_entropy -= float(chosen.sum())
        correct += int((logits_AV.argmax(dim=-1) == answer_A).sum())
    assert float(sums["ce"]) == pytest.approx(cross_entropy, rel=1e-5)
    assert float(sums["accuracy"]) == correct
    regression = objective.regression.sums(mapped_BPD, batch.speech)
    assert float(sums["word"]) == float(regression["word"]) > 0
    assert float(sums["pad"]) == float(regression["pad"]) > 0


@each_family
def test_with_the_text_alone_the_llm_reads_a_position_a_token(name: str, uneven: Any) -> None:
    """The first L positions stand in the prompt; the squared errors are over all of them all the same."""
    world = uneven(name)
    items = replace(world.items.mixture, splice="text")
    text_alone = InstructionItems(world.items.speech, world.chat, items)
    batch = text_alone.collate(np.array(some(world)), EPOCH)
    objective = world.objective(splice="text")
    whole = collate(world, some(world))
    num_tokens = world.items.columns["num_tokens"][some(world)]
    assert batch.is_speech_BL.sum(dim=1).tolist() == num_tokens.tolist()
    spare = int(whole.is_speech_BL.sum() - batch.is_speech_BL.sum())
    assert spare > 0
    assert int(whole.is_real_BL.sum() - batch.is_real_BL.sum()) == spare
    with torch.no_grad():
        sums, of_all = objective(batch), world.objective()(whole)
        mapped_BPD = objective.mapper(batch.speech.feats_BTE, batch.speech.num_frames_B)
        embeds_ND = torch.cat([mapped_BPD[b, :count] for b, count in enumerate(num_tokens)])
        embeds_BLD = splice(world.llm.get_input_embeddings()(batch.ids_BL), batch.is_speech_BL, embeds_ND)
        row_LD = embeds_BLD[0][batch.is_real_BL[0]]
        alone_AV = world.llm(inputs_embeds=row_LD[None]).logits[0, -int((batch.answer_ids_BA[0] != IGNORED).sum()) :]
        logits_BAV = objective.answer_logits(mapped_BPD, batch)
    assert torch.allclose(logits_BAV[0, -len(alone_AV) :], alone_AV, atol=1e-4)
    assert {term: float(sums[term]) for term in ("word", "pad")} == {t: float(of_all[t]) for t in ("word", "pad")}
    assert float(sums["llm_tokens"]) == int(batch.is_real_BL.sum())
    assert (text_alone.lengths < world.items.lengths).any()


def test_accuracy_counts_the_tokens_that_are_the_likeliest(exact: Any) -> None:
    """Of answers that the LLM itself gives, all; of answers with one other token, all but that one."""
    world = exact("llama3")
    batch = collate(world, some(world))
    objective = world.objective(mapper=Fixed(told(world, batch)))
    with torch.no_grad():
        likeliest_BA = objective.answer_logits(told(world, batch), batch).argmax(dim=-1)
    answers_BA = likeliest_BA.masked_fill(batch.answer_ids_BA == IGNORED, IGNORED)
    asked = int((answers_BA != IGNORED).sum())
    assert float(objective(batch._replace(answer_ids_BA=answers_BA))["accuracy"]) == asked
    answers_BA[2, -1] = (answers_BA[2, -1] + 1) % 7
    assert float(objective(batch._replace(answer_ids_BA=answers_BA))["accuracy"]) == asked - 1


def test_counts_are_answer_tokens_and_positions(uneven: Any) -> None:
    world = uneven("llama3")
    objective, items = world.objective(), world.items
    counts = objective.counts(items.columns)
    sizes = [len(answer) for answer in items.answers]
    assert counts["ce"].tolist() == counts["accuracy"].tolist() == sizes
    assert counts["llm_tokens"].tolist() == [1] * len(sizes)
    positions = items.columns["num_frames"] // 4
    words = np.minimum(items.columns["num_tokens"] + 1, positions)
    assert counts["word"].tolist() == words.tolist()
    assert counts["pad"].tolist() == (positions - words).tolist()
    assert (counts["pad"] > 0).any()
    batch = items.collate(np.arange(len(items)), EPOCH)
    assert int((batch.answer_ids_BA != IGNORED).sum()) == counts["ce"].sum()
    assert int(batch.is_speech_BL.sum()) == counts["word"].sum() + counts["pad"].sum()


def test_the_weights_are_those_of_the_loss(exact: Any) -> None:
    objective = exact("llama3").objective(sigma=0.9, alpha=7.0)
    assert objective.weights == pytest.approx({"ce": 0.1, "word": 6.3, "pad": 2.7})
    assert objective.measures == ("accuracy", "llm_tokens")


def test_sigma_zero_computes_no_regression(exact: Any) -> None:
    world = exact("llama3")
    objective = world.objective(sigma=0.0)
    assert objective.weights == {"ce": 1.0}

    def never(*args: object) -> object:
        raise AssertionError("the regression is computed")

    objective.regression.sums = never
    sums = objective(collate(world, some(world)))
    assert set(sums) == {"ce", "accuracy", "llm_tokens"}
    sums["ce"].backward()


@pytest.mark.parametrize("sigma", [1.0, -0.1, float("nan")])
def test_a_sigma_beyond_its_bounds_is_an_error(sigma: float) -> None:
    with pytest.raises(ValueError, match=r"objective\.sigma is"):
        InstructConfig(sigma=sigma)


@pytest.mark.parametrize(("name", "value"), [("alpha", 10.5), ("alpha", -1.0), ("mse", "mean")])
def test_other_settings_beyond_their_bounds_are_errors(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"objective\.{name} is"):
        InstructConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_sums_are_fp32_whatever_the_llm_is(dtype: str, uneven: Any) -> None:
    world = uneven("llama3")
    objective = world.objective()
    objective.llm = load_model(str(world.llm_folder), None, dtype)
    sums = objective(collate(world, some(world)))
    assert {sums[term].dtype for term in ("ce", "accuracy", "word", "pad")} == {torch.float32}
    with torch.no_grad():
        expected = world.objective()(collate(world, some(world)))["ce"]
    assert float(sums["ce"].detach()) == pytest.approx(float(expected), rel=2e-2)


# ---- gradients


def gradients(objective: InstructObjective, batches: list[PromptedBatch]) -> dict[str, Tensor]:
    """Of the weighted sums of some micro-batches, by the mapper's parameters."""
    objective.train()
    objective.mapper.zero_grad()
    for batch in batches:
        sums = objective(batch)
        torch.stack([weight * sums[term] for term, weight in objective.weights.items()]).sum().backward()
    return {name: p.grad.clone() for name, p in objective.mapper.named_parameters() if p.grad is not None}


@each_family
def test_only_the_mapper_has_a_gradient_and_a_padded_one_is_that_of_the_items_alone(name: str, uneven: Any) -> None:
    world = uneven(name)
    items, objective = some(world), world.objective()
    before = {n: p.clone() for n, p in world.llm.named_parameters()}
    together = gradients(objective, [collate(world, items)])
    assert set(together) == set(dict(objective.mapper.named_parameters()))
    assert all(torch.isfinite(grad).all() for grad in together.values())
    assert sum(float(grad.square().sum()) for grad in together.values()) > 1e-3
    assert not any(p.requires_grad or p.grad is not None for p in world.llm.parameters())
    assert all(torch.equal(p, before[n]) for n, p in world.llm.named_parameters())
    alone = gradients(objective, [collate(world, [item]) for item in items])
    assert relative_difference(together, alone) < 1e-5


@each_family
def test_an_item_s_gradient_is_the_same_beside_longer_ones(name: str, uneven: Any) -> None:
    """At its own positions; beyond them nothing arrives, whatever stands there."""
    world = uneven(name)
    items = some(world)
    batch = collate(world, items)
    counts = positions_of(batch.speech.num_frames_B).tolist()
    mapped_BPD = torch.randn(len(items), max(counts), 32, generator=torch.Generator().manual_seed(0))

    def slopes(mapped_BPD: Tensor, batch: PromptedBatch) -> Tensor:
        mapper = Fixed(mapped_BPD.clone())
        world.objective(mapper=mapper, sigma=0.0)(batch)["ce"].backward()
        assert mapper.mapped_BPD.grad is not None
        return mapper.mapped_BPD.grad

    together_BPD = slopes(mapped_BPD, batch)
    for b, (item, count) in enumerate(zip(items, counts, strict=True)):
        alone_PD = slopes(mapped_BPD[b : b + 1, :count], collate(world, [item]))[0]
        assert alone_PD.norm() > 1e-3
        assert float((together_BPD[b, :count] - alone_PD).norm() / alone_PD.norm()) < 1e-5
        assert (together_BPD[b, count:] == 0).all()


def test_training_is_the_mapper_s_alone(exact: Any) -> None:
    objective = exact("llama3").objective()
    assert objective.train() is objective
    assert objective.mapper.training
    assert not any(module.training for module in objective.llm.modules())
    objective.eval()
    assert not objective.mapper.training
    assert not any(module.training for module in objective.llm.modules())


@each_family
def test_recomputed_activations_give_the_same_gradient(name: str, uneven: Any) -> None:
    world = uneven(name)
    batch = collate(world, some(world))
    expected = gradients(world.objective(), [batch])
    objective, calls = world.objective(), []
    objective.llm = load_model(str(world.llm_folder), None, "float32")
    for layer in objective.llm.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    objective.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = gradients(objective, [batch])
    assert len(calls) == 2 * len(objective.llm.model.layers)  # in the forward, and again in the backward
    assert relative_difference(found, expected) < 1e-6
    objective.eval()
    assert not any(module.training for module in objective.llm.modules())
    with torch.no_grad():
        assert float(objective(batch)["ce"]) == pytest.approx(float(world.objective().eval()(batch)["ce"]), rel=1e-6)


@pytest.mark.parametrize(("name", "setting"), [("llama3", "attention_dropout"), ("phi3", "resid_pdrop")])
def test_recomputing_an_llm_with_dropout_is_refused(name: str, setting: str, exact: Any, tmp_path: Path) -> None:
    """Recomputed activations put the LLM in training mode, so that its dropout would be on."""
    folder = Path(shutil.copytree(exact(name).llm_folder, tmp_path / "llm"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, setting: 0.1}))
    world = exact(name)
    TargetsLlm(world.targets, str(world.llm_folder), None).require_no_dropout()
    with pytest.raises(UserError, match=f"checkpoint_activations: LLM {folder} has {setting} 0.1 in its config"):
        TargetsLlm(world.targets, str(folder), None).require_no_dropout()


# ---- splicing


def test_positions_take_their_places_in_order() -> None:
    embeds_BLD, mapped_ND = torch.zeros(2, 4, 3), torch.arange(9.0).view(3, 3) + 1
    is_speech_BL = torch.tensor([[False, True, True, False], [False, False, False, True]])
    spliced = splice(embeds_BLD, is_speech_BL, mapped_ND.double())
    assert spliced.dtype == torch.float32
    assert torch.equal(spliced[is_speech_BL], mapped_ND)
    assert (spliced[~is_speech_BL] == 0).all()
    assert (embeds_BLD == 0).all()


@pytest.mark.parametrize("count", [2, 4])
def test_a_wrong_number_of_places_is_an_error(count: int) -> None:
    with pytest.raises(ValueError, match=f"3 places for {count} mapped positions"):
        splice(torch.zeros(1, 4, 2), torch.tensor([[True, True, True, False]]), torch.zeros(count, 2))


def test_a_batch_whose_places_do_not_fit_is_an_error(exact: Any) -> None:
    world = exact("llama3")
    batch = collate(world, some(world))
    is_speech_BL = batch.is_speech_BL.clone()
    is_speech_BL[0, int(is_speech_BL[0].nonzero()[0])] = False
    with pytest.raises(ValueError, match="places for"):
        world.objective()(batch._replace(is_speech_BL=is_speech_BL))
