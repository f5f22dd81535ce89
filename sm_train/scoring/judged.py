"""What a judge is asked about hypotheses, and what follows from its verdicts. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from sm_train.errors import UserError
from sm_train.records import Task
from sm_train.scoring import scores
from sm_train.scoring.judge import Claim, Verdict
from sm_train.scoring.scores import Floats, Hypothesis, Result

ACCURACY, AGREEMENT, KAPPA, MASS = "accuracy (judge)", "agreement with the rule", "kappa with the rule", "yes or no"


def claims_of(hypotheses: Sequence[Hypothesis], tasks: Sequence[Task], with_context: bool) -> list[Claim]:
    """What each hypothesis claims, its question found in the instructions.

    A hypothesis names its utterance and its reference. Several questions of an utterance with one answer come in the
    order of the instructions, as evaluation asks them.

    Raises:
        UserError: a question, or a transcript where ``with_context``, is not in the instructions.
    """
    questions: dict[tuple[str, str], list[str]] = defaultdict(list)
    for task in tasks:
        if task.task == "sqa":
            questions[task.utterance_id, task.answer].append(task.variables.get("question", ""))
    transcripts = {task.utterance_id: task.answer for task in tasks if task.task == "asr"}
    places = [(i.system, i.split, i.group, i.prompt, i.id, i.reference) for i in hypotheses]
    times, seen, claims = Counter(places), Counter[tuple[str, ...]](), []
    for item, place in zip(hypotheses, places, strict=True):
        choices = questions.get((item.id, item.reference), [])
        if not choices or not all(choices):
            what = f"no question with the answer {item.reference!r} in the instructions"
            raise UserError(f"{item.id}: {what}; name the file that the evaluation had")
        if len(set(choices)) > 1 and times[place] != len(choices):
            what = f"{len(choices)} questions have the answer {item.reference!r}, {item.system} answered {times[place]}"
            raise UserError(f"{item.id}: {what}; give all of the evaluation's hypotheses")
        if with_context and item.id not in transcripts:
            raise UserError(f"{item.id}: its transcript, for {{context}}, is no asr task of the instructions; add it")
        context = transcripts[item.id] if with_context else ""
        claims.append(Claim(choices[seen[place] % len(choices)], item.reference, item.hypothesis, context))
        seen[place] += 1
    return claims


def judged(
    hypotheses: Sequence[Hypothesis], verdicts: Sequence[Verdict], facts: Mapping[str, str], normaliser: str
) -> list[Result]:
    """Results of each (system, split, group of prompts), with 95% bootstrap intervals over utterances.

    The accuracy by the judge; its agreement with the exact rule (the accuracy of results.json), as a share and beyond
    chance; and the mean probability of yes and no together, of those answers that it was asked about. ``facts`` of the
    judge go into the signatures.
    """
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for number, item in enumerate(hypotheses):
        groups[item.system, item.split, item.group].append(number)
    told = "|".join(f"{name}:{value}" for name, value in facts.items())
    ours = f"{told}|bootstrap:{scores.RESAMPLES}|seed:{scores.SEED}"
    results = []
    for (system, split, prompts), numbers in groups.items():
        items = [hypotheses[i] for i in numbers]
        pairs = [scores.normal_pair(item, normaliser) for item in items]
        rule, _, of_rule = scores.statistics("accuracy", items, pairs, normaliser, None)
        rows, ones = scores.utterance_rows([item.id for item in items]), np.ones(len(items))
        right = np.array([float(verdicts[i].right) for i in numbers])
        mass = np.array([verdicts[i].mass for i in numbers])
        cells = np.stack([right * rule[:, 0], right * (1 - rule[:, 0]), (1 - right) * rule[:, 0]], axis=1)
        cells = np.column_stack([cells, ones - cells.sum(axis=1)])
        asked = mass > 0
        for metric, stats, compute, signature in (
            (ACCURACY, np.stack([right, ones], axis=1), scores.share, ours),
            (AGREEMENT, cells, _agreement, f"{ours}|rule:{of_rule}"),
            (KAPPA, cells, kappa, f"{ours}|rule:{of_rule}"),
            (MASS, np.stack([mass, asked], axis=1), _share_of_asked, ours),
        ):
            if metric == MASS and not asked.any():
                continue
            interval = scores.with_interval(stats, rows, compute)
            signature = f"{metric}|{signature}"
            results.append(Result(system, "sqa", metric, *interval, len(items), split, signature, prompts))
    return results


def _share_of_asked(sums: Floats) -> float:
    return scores.share(sums) if sums[1] else 1.0


def _agreement(cells: Floats) -> float:
    return float((cells[0] + cells[3]) / cells.sum())


def kappa(cells: Floats) -> float:
    """Cohen's kappa (Cohen, 1960) of counts: both yes, the first alone, the second alone, neither.

    0 where both always say the same one thing: nothing then shows agreement beyond chance.
    """
    total = cells.sum()
    first, second = (cells[0] + cells[1]) / total, (cells[0] + cells[2]) / total
    by_chance = first * second + (1 - first) * (1 - second)
    return float((_agreement(cells) - by_chance) / (1 - by_chance)) if by_chance < 1 else 0.0
