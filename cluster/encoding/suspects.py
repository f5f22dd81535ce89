"""Which utterances of a unit end the encoder's process: found by bisection, one question at a time.

Nothing here knows Ray: an inquiry says what to try next, and is told what became of it.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from enum import Enum

from sm_train.errors import UserError
from sm_train.records import Quarantined, Unit, Utterance

REASON = "crashes_encoder"
DEATHS = 2
"""Deaths of its process after which a unit is looked into, and after which an utterance alone in it is barred."""
_FRUITLESS = 8  # searches that find nobody, after which the unit is given up
_UNCLEAR = 5  # tries of one step without a clear outcome, after which it counts as a crash


class Outcome(Enum):
    """What became of a step."""

    PASSED = "passed"
    CRASHED = "crashed"
    LOST = "lost"
    """Its process is gone for a reason outside it, or for an unknown one."""


@dataclass(frozen=True)
class Step:
    """What to try next, in a process that has nothing else at hand."""

    unit: Unit
    is_probe: bool


class Inquiry:
    """One unit under suspicion.

    It is encoded alone. Where that ends the process, halves of it are probed, with all other utterances barred;
    utterances are halved by duration, so that a half is whole batches. An utterance that twice ends the process with
    no other beside it is barred, for a single death may be the machine's fault. Then the unit is encoded without those,
    and so on until it passes. A killer costs about 2 log2(n) probes, half of which end a process, and none a batch that
    has nobody of its half in it.
    """

    def __init__(self, unit: Unit) -> None:
        self.barred: list[Quarantined] = []
        """Those found so far."""
        self._unit = unit
        self._steps = self._go_on()
        self.step: Step | None = next(self._steps)
        """What to try next; None once the unit has passed."""

    @property
    def unit(self) -> Unit:
        """The unit, with those found so far barred."""
        return replace(self._unit, barred=(*self._unit.barred, *self.barred))

    def report(self, outcome: Outcome) -> list[Quarantined]:
        """Say what became of the step; returns who was found by it.

        Raises:
            UserError: the unit ends its process again and again, but none of its utterances does so alone.
        """
        before = len(self.barred)
        try:
            self.step = self._steps.send(outcome)
        except StopIteration:
            self.step = None
        return self.barred[before:]

    def _go_on(self) -> Generator[Step, Outcome, None]:
        for _ in range(_FRUITLESS):
            while (yield from self._crashes(Step(self.unit, is_probe=False))):
                away = {row.id for row in self.unit.barred}
                left = sorted((u for u in self._unit.utterances if u.id not in away), key=lambda u: u.duration_s)
                if not left or not (yield from self._search(left, crashes=True)):
                    break
            else:
                return
        raise UserError(
            f"{self._unit.part} ended its encoder's process {_FRUITLESS} times, but none of its utterances does so "
            f"alone; the first is {self._unit.utterances[0].id!r}. Give encoders more memory (fewer actors, a smaller "
            "batch_s or ahead_mb) and run again"
        )

    def _search(self, group: list[Utterance], crashes: bool) -> Generator[Step, Outcome, int]:
        """Bar the killers of a group; how many there were. ``crashes``: some are known to be there."""
        if len(group) == 1:
            for _ in range(DEATHS):
                if not (yield from self._crashes(self._probe(group))):
                    return 0
            detail = f"its encoder's process died {DEATHS} times with no other utterance beside it"
            self.barred.append(Quarantined(group[0].id, REASON, detail))
            return 1
        if not crashes and not (yield from self._crashes(self._probe(group))):
            return 0
        half = len(group) // 2
        found = yield from self._search(group[:half], crashes=False)
        return found + (yield from self._search(group[half:], crashes=not found))

    def _probe(self, group: list[Utterance]) -> Step:
        away = {row.id: row for row in self.unit.barred}
        for utterance in self._unit.utterances:
            if utterance not in group:
                away.setdefault(utterance.id, Quarantined(utterance.id, REASON, "left out of a probe"))
        return Step(replace(self._unit, barred=tuple(away.values())), is_probe=True)

    @staticmethod
    def _crashes(step: Step) -> Generator[Step, Outcome, bool]:
        for _ in range(_UNCLEAR):
            outcome = yield step
            if outcome is not Outcome.LOST:
                return outcome is Outcome.CRASHED
        return True
