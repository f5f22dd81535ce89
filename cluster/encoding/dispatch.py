"""The driver's loop: units to actors, receipts back, and what to do about actors that die.

Calls are at most once each: the driver itself counts what died with an actor, since a unit that ends its process would
otherwise end every process it is given to.
"""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.encoding.suspects import DEATHS, Inquiry, Outcome, Step
from sm_train.errors import OF_THE_DISK, UserError
from sm_train.meter import Event, Incident
from sm_train.precompute import UNITS_AHEAD
from sm_train.records import Unit

_PATIENCE_S = 60.0  # after which waiting in vain for a place is said
_PAUSE_S = 1.0  # before another actor is asked for where one could not even start
_FAILED_STARTS = 20  # crashes of starting processes, none in between that started, after which the job fails


@dataclass(eq=False)
class _Slot:
    """An actor, and what it has at hand."""

    actor: Any
    worker: str = ""
    is_placed: bool = False
    is_loaded: bool = False
    units: int = 0
    inquiry: Inquiry | None = None


@dataclass(frozen=True)
class _Call:
    slot: _Slot
    what: Unit | Step | None
    """None for a start."""


class Dispatch:
    """Every unit is encoded once by some actor, whoever dies.

    A unit whose process died twice while it was there is looked into: an actor that has nothing else at hand takes it
    through an :class:`Inquiry`. The other actors go on meanwhile.

    Args:
        ray: the module, or what stands for it.
        start: asks for one more actor.
        wanted: what actors ask of the cluster, for messages.
        decoders: answers to come from decode actors, each once it has a place.
    """

    def __init__(
        self, ray: Any, start: Callable[[], Any], actors: int, wanted: str, units: Sequence[Unit],
        decoders: Sequence[Any] = (),
    ) -> None:  # fmt: skip
        self._ray, self._start_actor, self._wanted = ray, start, wanted
        self._actors, self._left = min(actors, len(units)), len(units)
        self._todo, self._suspects = deque(units), deque[Inquiry]()
        self._deaths: Counter[int] = Counter()
        self._flying: dict[Any, _Call] = {}
        self._decoders, self._is_decoding = list(decoders), not decoders
        self._slots: list[_Slot] = []
        self._failed_starts = 0
        errors = ray.exceptions
        self._losses = (
            errors.RayActorError, errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError,
            errors.ObjectLostError,
        )  # fmt: skip

    def run(self) -> Generator[Event, None, None]:
        """Receipts in the order of completion, and what happens between them.

        Raises:
            UserError: a person's mistake that an actor met; encoders' processes die at their start; a unit that nobody
                can encode.
        """
        for _ in range(self._actors):
            self._start()
        begun, waited_s = time.perf_counter(), 0.0
        while self._left:
            asked = time.perf_counter()
            arrived, _ = self._ray.wait([*self._flying, *self._decoders], num_returns=1, timeout=_PATIENCE_S)
            waited_s += time.perf_counter() - asked
            for ref in arrived:
                if ref in self._decoders:
                    self._decoders.remove(ref)
                    self._is_decoding = True
                else:
                    yield from self._take(ref)
            if not arrived and not (self._is_decoding and any(slot.is_placed for slot in self._slots)):
                print(f"waiting: no node of the Ray cluster has {self._wanted} free", file=sys.stderr, flush=True)
            self._feed()
        yield Incident("dispatch", seconds=time.perf_counter() - begun - waited_s)

    def _start(self) -> None:
        slot = _Slot(self._start_actor())
        self._slots.append(slot)
        self._flying[slot.actor.ready.remote()] = _Call(slot, None)
        self._flying[slot.actor.load.remote()] = _Call(slot, None)

    def _take(self, ref: Any) -> Generator[Event, None, None]:
        call = self._flying.pop(ref)
        slot = call.slot
        try:
            answer = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            is_told = isinstance(cause, UserError) or (isinstance(cause, OSError) and cause.errno in OF_THE_DISK)
            raise (cause if is_told else error) from None
        except self._losses as error:
            yield from self._lost(slot, call, error)
            return
        if call.what is None and answer:
            slot.worker, slot.is_placed = answer, True
        elif call.what is None:
            slot.is_loaded, self._failed_starts = True, 0
        else:
            slot.units -= 1
            if slot.inquiry:
                yield from self._hear(slot.inquiry, Outcome.PASSED, slot)
            if isinstance(call.what, Unit) or not call.what.is_probe:
                self._left -= 1
                yield answer

    def _lost(self, slot: _Slot, call: _Call, error: Exception) -> Generator[Event, None, None]:
        """An actor is gone, or cannot be reached: another one takes its place, and its units."""
        gone = [call, *(self._flying.pop(ref) for ref, other in [*self._flying.items()] if other.slot is slot)]
        self._slots.remove(slot)
        try:
            self._ray.kill(slot.actor)
        except Exception as why:  # it is gone
            del why
        yield Incident("death", slot.worker, units=slot.units, detail=_how(error))
        outcome = self._outcome(error)
        if not slot.is_loaded:
            self._failed_starts += outcome is Outcome.CRASHED
            if self._failed_starts >= _FAILED_STARTS:
                raise UserError(
                    f"encoders' processes died {_FAILED_STARTS} times at their start, the last one so: {error}"
                )
            time.sleep(_PAUSE_S)
        elif slot.inquiry:
            yield from self._hear(slot.inquiry, outcome, slot)
            if slot.inquiry:
                self._suspects.appendleft(slot.inquiry)
        for unit in reversed([other.what for other in gone if isinstance(other.what, Unit)]):
            self._deaths[unit.index] += not _is_of_the_node(error)
            if self._deaths[unit.index] < DEATHS:
                self._todo.appendleft(unit)
            else:
                self._suspects.append(Inquiry(unit))
        self._start()

    def _outcome(self, error: Exception) -> Outcome:
        unclear = isinstance(error, self._ray.exceptions.ActorUnavailableError) or _is_of_the_node(error)
        return Outcome.LOST if unclear else Outcome.CRASHED

    def _hear(self, inquiry: Inquiry, outcome: Outcome, slot: _Slot) -> Generator[Event, None, None]:
        part, step = inquiry.unit.part, inquiry.step
        if step and step.is_probe:
            yield Incident("probe", slot.worker, part)
        for row in inquiry.report(outcome):
            yield Incident("barred", slot.worker, part, row)
        if inquiry.step is None:
            slot.inquiry = None

    def _feed(self) -> None:
        """Keep loaded actors at work: one that an inquiry needs gets nothing else, the others units ahead."""
        loaded = sorted((slot for slot in self._slots if slot.is_loaded), key=lambda slot: slot.units)
        room = (max(len(loaded) - 1, 1) if self._todo else len(loaded)) - sum(bool(s.inquiry) for s in loaded)
        waiting = len(self._suspects)
        for slot in loaded:
            if not slot.inquiry and waiting > 0 and room > 0:
                waiting, room = waiting - 1, room - 1
                if slot.units:  # it will be free for the inquiry soon
                    continue
                slot.inquiry = self._suspects.popleft()
            if slot.inquiry:
                if not slot.units and slot.inquiry.step:
                    step = slot.inquiry.step
                    self._send(slot, step, slot.actor.encode.remote(step.unit, step.is_probe))
                continue
            while self._todo and slot.units < UNITS_AHEAD:
                unit = self._todo.popleft()
                self._send(slot, unit, slot.actor.encode.remote(unit))

    def _send(self, slot: _Slot, what: Unit | Step, ref: Any) -> None:
        self._flying[ref] = _Call(slot, what)
        slot.units += 1


def _how(error: Exception) -> str:
    """What Ray says happened: the first sentence of its message's last line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].partition(". ")[0]


def _is_of_the_node(error: Exception) -> bool:
    return "node has died" in str(error) or type(error).__name__ == "NodeDiedError"
