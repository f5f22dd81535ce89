"""Everything that is known of a world so far: figures and costs of each row, read from what its items left behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sm_train import config
from sm_train.evaluate import EvaluateConfig
from sm_train.prompts import LANGUAGES
from sm_train.scoring import robustness
from sm_train.scoring.language import Languages, open_languages
from sm_train.scoring.robustness import Robustness
from tools.reproduce import compute, tallies
from tools.reproduce.compute import Compute
from tools.reproduce.graph import REFERENCES, Places, items_of
from tools.reproduce.runner import Book
from tools.reproduce.tallies import Interval, Place, Tally
from tools.reproduce.world import METRICS, WorldConfig

NO_SEED = -1
"""The seed of a reference."""


@dataclass(frozen=True)
class Results:
    """By row, only those rows of which one seed at least was evaluated."""

    world: WorldConfig
    scores: dict[str, dict[Place, dict[int, Tally]]]
    own: dict[str, Compute]
    """What a row's own training took, in the mean over seeds."""
    whole: dict[str, Compute]
    """The same, with the training of the rows it builds on."""
    heard: dict[str, Compute]
    """What an evaluation took, the first seed's, where it was counted; without FLOPs."""
    wordings: dict[str, list[Robustness]]
    """By task, of the first seed that was asked in every held-out wording."""
    left_out: list[str]
    """Items whose results are there, made by other words or from other inputs than the world's now."""

    def places(self, prompts: str, voices: str) -> list[Place]:
        """The columns of one group of prompts and voices that any row has a figure for."""
        of = [Place(metric, self.world.voices[voices], prompts) for metric in METRICS]
        return [place for place in of if any(place in row for row in self.scores.values())]

    def interval(self, row: str, *places: Place) -> Interval | None:
        """A row's figure, the mean of several columns where there are more; None if it lacks one."""
        found = [self.scores[row].get(place) for place in places]
        there = [one for one in found if one]
        return tallies.over_seeds(tallies.average(there)) if len(there) == len(found) else None

    def seeds(self, row: str) -> list[int]:
        """Those of a row that are there; none of a reference."""
        return sorted({seed for found in self.scores[row].values() for seed in found} - {NO_SEED})

    def entries(self) -> list[dict[str, Any]]:
        """Every figure as an object of table.json."""
        found = []
        for row, places in self.scores.items():
            for place, by_seed in places.items():
                one = tallies.over_seeds(by_seed)
                voices = next(name for name, split in self.world.voices.items() if split == place.split)
                found.append({
                    "row": row, "title": self.world.rows[row].title, "column": place.metric, "voices": voices,
                    "prompts": place.prompts, "value": one.value, "low": one.low, "high": one.high,
                    "seeds": [seed for seed in one.seeds if seed != NO_SEED], "utterances": one.count,
                    "by_seed": {str(seed): tally.value for seed, tally in by_seed.items() if seed != NO_SEED},
                })  # fmt: skip
        return found


def read(world: WorldConfig, root: Path) -> Results:
    """What the evaluations and runs under a folder say, rows in the order of the world."""
    places = Places(root)
    cfg = config.load(EvaluateConfig, [world.evaluate.file, *world.evaluate.words, "run=unknown"], "tools.reproduce")
    languages = _languages(places.corpus / "lexicon.json")
    found, book = Results(world, {}, {}, {}, {}, {}, []), _Done(world, root)
    found.left_out.extend(book.stale())
    references = _tallies(book.evaluation(REFERENCES, 0), cfg.normaliser, languages)
    of_references = compute.of_evaluation(places.evaluation(REFERENCES, 0)) if references else {}
    for row, asked in world.rows.items():
        seeds = [0] if asked.kind == "reference" else world.wordings.seeds
        name = REFERENCES if asked.kind == "reference" else row
        folders = filter(None, (book.wordings(name, seed) for seed in seeds))
        if entries := next(filter(None, (robustness.read(folder / robustness.FILE) for folder in folders)), []):
            mine = [e for e in entries if not e.system.endswith(tallies.NO_LLM)]
            found.wordings[row] = [e for e in mine if asked.kind != "reference" or e.system == row]
        if asked.kind == "reference":
            if row in references:
                found.scores[row] = {place: {NO_SEED: tally} for place, tally in references[row].items()}
                if row in of_references:
                    found.heard[row] = of_references[row]
            continue
        for seed in world.seeds_of(row):
            for of_system in _tallies(book.evaluation(row, seed), cfg.normaliser, languages).values():
                for place, tally in of_system.items():
                    found.scores.setdefault(row, {}).setdefault(place, {})[seed] = tally
        if row in found.scores:
            _add_compute(found, places, row)
            for spent in compute.of_evaluation(places.evaluation(row, found.seeds(row)[0])).values():
                found.heard[row] = spent
    return found


class _Done:
    """What is there as the world now has it: another world's results in the same folder are none of it."""

    def __init__(self, world: WorldConfig, root: Path) -> None:
        seeds = sorted({seed for row in world.rows for seed in world.seeds_of(row)})
        self._items = {item.name: item for item in items_of(world, root, list(world.rows), seeds)}
        self._book, self._places = Book(root, list(self._items.values())), Places(root)

    def evaluation(self, row: str, seed: int) -> Path | None:
        """The folder of an evaluation that is done."""
        name = f"{row}-{seed}-evaluate" if row != REFERENCES else REFERENCES
        return self._places.evaluation(row, seed) if self._is_done(name) else None

    def wordings(self, row: str, seed: int) -> Path | None:
        """The same of one on all wordings."""
        name = f"{row}-{seed}" if row != REFERENCES else REFERENCES
        return self._places.wordings(row, seed) if self._is_done(f"{name}-wordings") else None

    def stale(self) -> list[str]:
        """Evaluations that are there and not of this world."""
        evaluations = (item for item in self._items.values() if item.kind == "evaluate")
        return [item.name for item in evaluations if item.makes.exists() and not self._book.is_done(item)]

    def _is_done(self, name: str) -> bool:
        return name in self._items and self._book.is_done(self._items[name])


def _tallies(folder: Path | None, normaliser: str, languages: Languages | None) -> dict[str, dict[Place, Tally]]:
    if folder is None:
        return {}
    metrics = [name for name in METRICS if languages or not name.endswith("in language")]
    return tallies.read(folder, normaliser, languages, metrics)


def _languages(lexicon: Path) -> Languages | None:
    return open_languages(str(lexicon), [], LANGUAGES) if lexicon.is_file() else None


def _add_compute(found: Results, places: Places, row: str) -> None:
    """What a row's training took; nothing of its own where another row's mapper is evaluated again."""
    world, seeds = found.world, found.seeds(row)
    own, whole = [], []
    for seed in seeds:
        is_trained = world.rows[row].kind != "again"
        mine = compute.of_run(places.run(row, seed)) if is_trained else Compute()
        own.append(mine)
        base = world.rows[row].base
        while base:
            if world.rows[base].kind != "again":
                mine = mine + compute.of_run(places.run(base, seed))
            base = world.rows[base].base
        whole.append(mine)
    found.own[row], found.whole[row] = compute.mean_of(own), compute.mean_of(whole)
