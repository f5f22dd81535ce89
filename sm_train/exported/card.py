"""The model card of an exported folder, filled from its run: what went in, how well it did, and what licences mean."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sm_train import config, files
from sm_train.data import shards
from sm_train.data.mixing import Sources
from sm_train.data.target_set import UTTERANCES
from sm_train.exported.settings import STATE, SpeechLlmConfig
from sm_train.models import adapter
from sm_train.models.mapper import SpeechMapper
from sm_train.runlog import METRICS, revision
from sm_train.scoring.mappers import Trained
from sm_train.scoring.scores import Result, read_results
from sm_train.scoring.systems import TOPLINE

_ASKED = {"train": "", "held_out": ", held-out prompts"}
_NON_COMMERCIAL = "cc-by-nc-4.0"
_LICENCES = {"facebook/seamless-m4t-v2-": _NON_COMMERCIAL, "facebook/w2v-bert-2.0": "mit"}


@dataclass(frozen=True, slots=True)
class Seen:
    """What a run and its data say of themselves."""

    trained: Trained
    num_parameters: int
    hours: float
    utterances: int
    languages: tuple[str, ...]
    """Codes of the speech, then of the answers."""
    step: int
    losses: dict[str, float]
    """By name: of the last step that the log holds before the checkpoint, and of its last validation."""
    config_hash: str | None
    code: str | None
    """The revision that trained it."""
    results: tuple[Result, ...]
    """This mapper's and the topline's."""
    named: str
    """The mapper's name in them."""


def read(trained: Trained, sources: Sources, evaluated: Path) -> Seen:
    """Collect the facts of a checkpoint.

    Args:
        evaluated: a folder with results.json and evaluation.json, if it was evaluated at all.
    """
    step = files.read_object(trained.folder / STATE)["global_step"]
    hours, utterances, languages = _data(trained, sources)
    environment = trained.run / "environment.json"
    settings = trained.run / "config.yaml"
    results, named = _results(trained, evaluated)
    return Seen(
        trained,
        SpeechMapper.from_pretrained(trained.folder).num_parameters,
        hours,
        utterances,
        languages,
        step,
        _losses(trained.run / METRICS, step),
        config.fingerprint(config.read_yaml(settings)) if settings.exists() else None,
        files.read_object(environment).get("code") if environment.exists() else None,
        results,
        named,
    )


def _data(trained: Trained, sources: Sources) -> tuple[float, int, tuple[str, ...]]:
    """Hours and number of the utterances trained on, and the languages."""
    splits = trained.contract.get("splits")
    hours, count, languages = 0.0, 0, dict[str, None]()
    for folder, targets in zip(sources.folders, sources.sets, strict=True):
        table = shards.read_table(folder, UTTERANCES).take(targets.table.column("utterance"))
        chosen = np.isin(table.column("split").to_pylist(), splits or table.column("split").unique().to_pylist())
        hours += float(table.column("duration_s").to_numpy()[chosen].sum()) / 3600
        count += int(chosen.sum())
        languages |= dict.fromkeys(table.column("lang").unique().to_pylist())
    answers = [task.partition("-")[2] for task in trained.contract.get("tasks", {}) if task.startswith("st-")]
    return hours, count, tuple(dict.fromkeys(name for name in [*languages, *answers] if name))


def _losses(path: Path, step: int) -> dict[str, float]:
    found: dict[str, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            values = json.loads(line)
        except ValueError:  # the last line of a killed run
            continue
        if isinstance(values, dict) and values.get("step", step + 1) <= step:
            found |= {name: value for name, value in values.items() if name.startswith(("loss", "valid")) and value}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def _results(trained: Trained, evaluated: Path) -> tuple[tuple[Result, ...], str]:
    """The rows about these very weights, found by their hash, with the topline's."""
    marker, digests = evaluated / "evaluation.json", trained.digests()
    if not marker.exists() or not (evaluated / "results.json").exists():
        return (), trained.name
    hashed = files.read_object(marker).get("mappers")
    named = next((name for name, value in (hashed or {}).items() if value == digests), None)
    if named is None:
        return (), trained.name
    rows = read_results(evaluated / "results.json")
    return tuple(row for row in rows if row.system in (named, f"{named}, no LLM", TOPLINE)), named


def write(name: str, said: SpeechLlmConfig, seen: Seen, licence: str | None) -> str:
    """The card, as Markdown behind a YAML head."""
    encoder, llm = seen.trained.contract["encoder"], seen.trained.contract["llm"]
    known = next((is_for for repo, is_for in _LICENCES.items() if encoder.startswith(repo)), None)
    head = {
        "license": licence or known or "other",
        "base_model": [repo for repo in (llm, encoder) if _is_repository(repo)],
        "language": list(seen.languages),
        "library_name": "sm_train",
        "pipeline_tag": "audio-text-to-text",
        "tags": ["speech", "speechmapper", "arxiv:2601.20417"],
    }
    lines = ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items() if value), "---"]
    lines += ["", f"# {name}", "", _summary(said, seen), *_use(name), *_training(said, seen), *_scores(seen)]
    return "\n".join([*lines, *_licences(encoder, llm, known, licence), ""])


def _is_repository(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists()


def _summary(said: SpeechLlmConfig, seen: Seen) -> str:
    speech, contract = said.speech_encoder, seen.trained.contract
    changed = "Neither of the two was changed."
    if adapter.folder_of(seen.trained.folder):
        changed = (
            "The LLM answers with a low-rank adapter that was trained with the mapper (`mapper/`, in peft's format)."
        )
    return (
        f"A SpeechMapper ([arXiv 2601.20417](https://arxiv.org/abs/2601.20417)) of {seen.num_parameters:,} parameters: "
        f"it maps features of the frozen speech encoder `{contract['encoder']}` (layer {speech['layer']}, frames "
        f"averaged by {speech['pool']}) to input embeddings of the frozen LLM `{contract['llm']}`, which then answers "
        f"prompts about a recording. {changed}"
    )


def _use(name: str) -> list[str]:
    lines = f"""
## Use

With the package sm_train installed:

```python
from sm_train.exported import SpeechLlm
model = SpeechLlm.from_pretrained("{name}")
print(model.generate("question.wav", "Translate this into French."))
```

A list of (audio, prompt) pairs is answered as one batch. Recordings of any rate and number of channels are taken."""
    return lines.split("\n")


def _training(said: SpeechLlmConfig, seen: Seen) -> list[str]:
    contract, targets = seen.trained.contract, said.targets
    speech, llm = said.speech_encoder, said.llm
    rows = {
        "system": f"{seen.named}, step {seen.step}",
        "data": f"{seen.hours:.2f} h of speech, {seen.utterances:,} utterances, "
        f"splits {', '.join(contract.get('splits', ['all']))}, languages {', '.join(seen.languages) or 'not stated'}",
        "tasks": ", ".join(f"{task} {share:g}" for task, share in contract.get("tasks", {}).items()),
        "losses": ", ".join(f"{name} {value:.4g}" for name, value in seen.losses.items()),
        "speech encoder": f"`{contract['encoder']}`, revision {speech['revision'] or 'none'}, "
        f"weights {speech['weights_hash']}",
        "LLM": f"`{contract['llm']}`, revision {llm['revision'] or 'none'}, hash {llm['hash']}, "
        f"tokenizer {targets['tokenizer_hash']}, pad id {targets['pad_id']}",
        "positions": f"trim {said.trim}; normaliser of the targets {targets['normaliser']}",
        "config": seen.config_hash,
        "code": f"trained by {seen.code or 'an unknown revision'}, exported by {revision() or 'an unknown revision'}",
    }
    table = [f"| {key} | {value} |" for key, value in rows.items() if value]
    return ["", "## Training", "", "| | |", "|---|---|", *table]


def _scores(seen: Seen) -> list[str]:
    if not seen.results:
        return ["", "## Scores", "", "Not evaluated: no results about these weights were found when it was exported."]
    head = "| system | split and task | metric | value | 95% interval | items |"
    lines = ["", "## Scores", "", head, "|---|---|---|---|---|---|", *_rows(seen.results)]
    if any(row.system == TOPLINE for row in seen.results):
        lines += ["", "The topline is the LLM on the reference transcript, as text."]
    return lines


def _rows(results: Sequence[Result]) -> list[str]:
    return [
        f"| {row.system} | {row.split}, {row.task}{_ASKED[row.prompts]} | {row.metric} | {row.value:.4g} | "
        f"{row.low:.4g} to {row.high:.4g} | {row.count} |"
        for row in results
    ]


def _licences(encoder: str, llm: str, known: str | None, licence: str | None) -> list[str]:
    lines = ["", "## Licences", "", "This mapper learnt from the features of one model for the inputs of another."]
    if known == _NON_COMMERCIAL:
        what = "are CC BY-NC 4.0: a mapper trained on their features is for non-commercial use"
    elif known:
        what = f"have the licence {known}"
    else:
        what = (
            "have a licence that is not stated here: look it up before you share this folder. Those of "
            "SeamlessM4T-v2 are CC BY-NC 4.0: a mapper trained on their features is for non-commercial use"
        )
    lines += [f"- Speech encoder: the weights of `{encoder}` {what}."]
    lines += [
        f"- LLM: the licence of `{llm}` holds for its use here, and for the rows of its embedding in this folder."
    ]
    return [*lines, f"- Stated for this folder: {licence}."] if licence else lines
