"""How fast an evaluation's systems answer, measured batch by batch in this process."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sm_train.data import manifest
from sm_train.data.target_set import TargetSet
from sm_train.models.llm import FrozenLlm
from sm_train.models.mapper import SpeechMapper
from sm_train.prompts import LANGUAGES, read_prompts
from sm_train.scoring import scores
from sm_train.scoring.answers import Question, Utterances, questions_about
from sm_train.scoring.language import open_languages
from sm_train.scoring.scores import Hypothesis
from sm_train.scoring.systems import Mapped, System, Topline, ask
from sm_train.train import checkpoint
from tools.plan_capacity.jobs import Place
from tools.plan_capacity.readings import fit


@dataclass(frozen=True)
class Answering:
    """Seconds of an evaluation's parts."""

    answer_s: float
    """An answer that ends, as the topline's do."""
    cut_answer_s: float
    """An answer in a batch that goes on to max_new_tokens."""
    hear_s: float
    """An utterance through a mapper, its transcript included."""
    score_s: float
    """A hypothesis."""
    topline_s: float
    """All of the topline's answers."""
    mapped_s: float
    """All of the mapper's answers."""


def measure(place: Place) -> Answering:
    """Topline and stage 1 on the place's test splits, by the evaluation's own code."""
    cfg = place.shapes.evaluate
    torch.set_num_threads(cfg.threads)
    targets, utterances = TargetSet(place.shards, cfg.target), Utterances(place.shards, cfg.splits)
    tasks, prompts = manifest.read_instructions(Path(cfg.instructions)), read_prompts(Path(cfg.prompts))
    questions = questions_about(utterances, tasks, prompts, cfg.groups, cfg.seed, cfg.paraphrases)
    llm = FrozenLlm(cfg.llm)
    steps = 0

    def count(*_: object) -> None:
        nonlocal steps
        steps += 1

    llm.model.register_forward_hook(count)
    mapper = SpeechMapper.from_pretrained(checkpoint.find(Path(cfg.run), cfg.checkpoint))
    systems: list[System] = [
        Topline(llm, targets.contract["normaliser"]), Mapped(mapper, targets, cfg.trim, llm.device, "stage 1"),
    ]  # fmt: skip
    lengths: list[list[float]] = []
    seconds: list[list[float]] = []
    hear_s, hypotheses = 0.0, list[Hypothesis]()
    for system in systems:
        vectors, hear_s = _hear(system, utterances)
        order = sorted(range(len(questions)), key=lambda i: len(vectors[questions[i].ordinal]))
        lengths.append([])
        seconds.append([])
        for first in range(-1, len(order), cfg.batch_size):
            batch = [questions[i] for i in order[max(first, 0) : max(first, 0) + cfg.batch_size]]
            before, begun = steps, time.perf_counter()
            texts = ask(llm, [q.message for q in batch], [vectors[q.ordinal] for q in batch], cfg.max_new_tokens, None)
            if first >= 0 or len(order) <= cfg.batch_size:  # once for nothing, to be warm
                lengths[-1].append(steps - before)
                seconds[-1].append(time.perf_counter() - begun)
                hypotheses += [_hypothesis(system.name, q, text) for q, text in zip(batch, texts, strict=True)]
    base, slope = fit(np.concatenate(lengths), np.concatenate(seconds))
    size = min(cfg.batch_size, len(questions))
    topline, cut = ((base + slope * n) / size for n in (float(np.mean(lengths[0])), cfg.max_new_tokens))
    asked_for = {q.task.target_lang for q in questions if q.task.task == "st"}
    begun = time.perf_counter()
    scores.score(hypotheses, cfg.normaliser, open_languages(cfg.lexicon, asked_for, LANGUAGES))
    score_s = (time.perf_counter() - begun) / len(hypotheses)
    return Answering(topline, cut, hear_s, score_s, sum(seconds[0]), sum(seconds[1]))


def _hear(system: System, utterances: Utterances) -> tuple[dict[int, torch.Tensor], float]:
    """Vectors of every utterance, and seconds of one with its transcript."""
    begun = time.perf_counter()
    heard = {row["ordinal"]: utterances.heard(row["ordinal"], row["text"]) for row in utterances.rows}
    vectors = {ordinal: system.vectors(one) for ordinal, one in heard.items()}
    for one in heard.values():
        system.transcript(one)
    return vectors, (time.perf_counter() - begun) / len(heard)


def _hypothesis(system: str, question: Question, text: str) -> Hypothesis:
    task = question.task
    return Hypothesis(
        system, task.task, task.target_lang, question.split, question.ordinal, task.utterance_id, question.prompt,
        task.answer, text, question.group,
    )  # fmt: skip
