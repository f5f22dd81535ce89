"""The loop that feeds actors, against a Ray that fails on command; the real one is in tests/integration."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest

from cluster.encoding import dispatch
from cluster.encoding.dispatch import Dispatch
from sm_train.errors import UserError
from sm_train.meter import Incident
from sm_train.precompute import UNITS_AHEAD
from sm_train.records import Receipt, Unit, Utterance


class RayTaskError(Exception):
    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class RayActorError(Exception):
    pass


class ActorUnavailableError(RayActorError):
    pass


class ActorDiedError(RayActorError):
    pass


class WorkerCrashedError(Exception):
    pass


class NodeDiedError(Exception):
    pass


class OutOfMemoryError(Exception):
    pass


class ObjectLostError(Exception):
    pass


NODE = "The actor died because its node has died. Node Id: 7"


class Actor:
    """A process of its own: what is in it dies with it."""

    def __init__(self, ray: FakeRay, number: int) -> None:
        self.ray, self.number, self.death, self.loaded = ray, number, None, False
        self.calls: list[Ref] = []
        for name in ("ready", "load", "encode"):
            setattr(self, name, SimpleNamespace(remote=lambda *args, name=name: self.call(name, *args)))

    def call(self, name: str, unit: Unit | None = None, is_probe: bool = False) -> Ref:
        ref = Ref(self, name, unit, is_probe)
        self.calls.append(ref)
        if is_probe:
            assert len([other for other in self.calls if other.name == "encode"]) == 1, "a probe is not alone"
        return ref

    def die(self, error: Exception) -> None:
        self.death = error


class Ref:
    def __init__(self, actor: Actor, name: str, unit: Unit | None, is_probe: bool) -> None:
        self.actor, self.name, self.unit, self.is_probe = actor, name, unit, is_probe


class FakeRay:
    """Actors that have a place, up to ``places``; utterances named in ``killers`` end whatever process works on them.

    ``fates`` says what else happens: called before each answer with the actor and how many answers there were.
    """

    exceptions = SimpleNamespace(
        RayTaskError=RayTaskError, RayActorError=RayActorError, ActorDiedError=ActorDiedError,
        ActorUnavailableError=ActorUnavailableError, WorkerCrashedError=WorkerCrashedError,
        NodeDiedError=NodeDiedError, OutOfMemoryError=OutOfMemoryError, ObjectLostError=ObjectLostError,
    )  # fmt: skip

    def __init__(
        self, killers: Sequence[str] = (), places: int = 9, seed: int = 0,
        fates: Callable[[Actor, int], Exception | None] = lambda actor, answers: None,
    ) -> None:  # fmt: skip
        self.killers, self.places, self.fates = set(killers), places, fates
        self.rng, self.actors, self.answers = random.Random(seed), list[Actor](), 0
        self.forwards: Counter[int] = Counter()
        self.deaths = self.most_in_flight = self.vain_waits = 0
        self.error: Exception | None = None

    def start(self) -> Actor:
        self.actors.append(Actor(self, len(self.actors)))
        return self.actors[-1]

    def kill(self, actor: Actor) -> None:
        actor.die(ActorDiedError("killed"))

    def wait(self, refs: list[Ref], num_returns: int, timeout: float) -> tuple[list[Ref], list[Ref]]:
        in_flight = Counter(ref.actor.number for ref in refs if ref.unit)
        self.most_in_flight = max(self.most_in_flight, *in_flight.values(), 0)
        living = [actor for actor in self.actors if actor.death is None][: self.places]
        ready = [ref for ref in refs if ref.actor in living or ref.actor.death]
        if not ready:
            self.vain_waits += 1
            self.places = 9
            return [], refs
        busy = self.rng.choice(ready).actor
        return [next(ref for ref in ready if ref.actor is busy)], []

    def get(self, ref: Ref) -> Receipt | str | None:
        actor = ref.actor
        actor.calls.remove(ref)
        self.answers += 1
        if actor.death is None and (error := self.fates(actor, self.answers)):
            actor.die(error)
            self.deaths += 1
        in_it = [ref, *actor.calls]
        present = {u.id for other in in_it if other.unit for u in other.unit.utterances} - {
            row.id for other in in_it if other.unit for row in other.unit.barred
        }
        if actor.death is None and present & self.killers and actor.loaded:
            actor.die(ActorDiedError("The actor died unexpectedly before finishing this task."))
            self.deaths += 1
        if actor.death:
            raise actor.death
        if ref.name == "ready":
            return f"host:{actor.number}"
        if ref.name == "load":
            actor.loaded = True
            if self.error:
                raise RayTaskError(self.error)
            return None
        assert ref.unit is not None
        self.forwards[ref.unit.index] += 1
        bad = tuple(row.reason for row in ref.unit.barred)
        return Receipt(ref.unit.part, len(ref.unit.utterances) - len(bad), len(bad), 1.0, 1.0, 0.1, 1.2, bad)


def units_of(count: int, size: int = 4) -> list[Unit]:
    names = [[f"u{i}-{j}" for j in range(size)] for i in range(count)]
    return [
        Unit(i, tuple(Utterance(name, "", 0, 1 + j, "", "", "", "") for j, name in enumerate(row)))
        for i, row in enumerate(names)
    ]


def work(ray: FakeRay, units: int = 7, actors: int = 2, size: int = 4) -> list[str]:
    """Run to the end: every unit once; returns who was barred."""
    events = list(Dispatch(ray, ray.start, actors, "1 CPU", units_of(units, size)).run())
    receipts = [event for event in events if isinstance(event, Receipt)]
    assert sorted(receipt.part for receipt in receipts) == [f"part-{i:07d}" for i in range(units)]
    barred = [event.row.id for event in events if isinstance(event, Incident) and event.row]
    assert sum(receipt.num_quarantined for receipt in receipts) == len(barred) == len(set(barred))
    assert sum(isinstance(e, Incident) and e.kind == "death" for e in events) >= ray.deaths
    return sorted(barred)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_PAUSE_S", 0.0)


def test_every_unit_comes_back_once_and_few_are_in_flight() -> None:
    ray = FakeRay()
    assert work(ray) == []
    assert len(ray.actors) == 2
    assert ray.most_in_flight <= UNITS_AHEAD
    assert work(one := FakeRay(), units=1) == []
    assert len(one.actors) == 1


def test_an_actor_that_dies_or_cannot_be_reached_is_replaced_once_and_its_units_are_done() -> None:
    for error in (ActorDiedError("gone"), ActorUnavailableError("?"), ActorDiedError(NODE), OutOfMemoryError("oom")):
        ray = FakeRay(fates=lambda actor, answers, error=error: error if answers == 6 else None)
        assert work(ray) == []
        assert (len(ray.actors), ray.deaths) == (3, 1)
        assert set(ray.forwards.values()) == {1}


def test_actors_without_a_place_do_not_hold_the_job_up() -> None:
    assert work(FakeRay(places=1)) == []


def test_without_a_node_the_driver_waits_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert work(ray := FakeRay(places=0)) == []
    assert ray.vain_waits == 1
    assert capsys.readouterr().err == "waiting: no node of the Ray cluster has 1 CPU free\n"


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    "killers",
    [["u0-0"], ["u6-3"], ["u2-1", "u2-2"], ["u2-0", "u2-1", "u2-2", "u2-3"], ["u0-1", "u3-0", "u3-3", "u6-2"]],
    ids=",".join,
)
@pytest.mark.parametrize("actors", [1, 2, 3])
def test_killers_are_barred_and_nobody_else(actors: int, killers: list[str], seed: int) -> None:
    ray = FakeRay(killers, seed=seed)
    assert work(ray, actors=actors) == sorted(killers)
    units = {name.partition("-")[0] for name in killers}
    assert ray.deaths <= 2 * len(units) + len(units) + len(killers) * (2 + 2) + 2 * actors
    innocent = [n for i, n in ray.forwards.items() if f"u{i}" not in units]
    assert set(innocent) == {1}, "an innocent unit is encoded once, whoever was beside it"


def test_other_units_go_on_while_one_is_looked_into() -> None:
    ray = FakeRay(["u0-2"], seed=1)
    order = [e for e in Dispatch(ray, ray.start, 2, "", units_of(40, 16)).run() if not isinstance(e, Incident)]
    place = [receipt.part for receipt in order].index("part-0000000")
    assert place > 5


@pytest.mark.parametrize("seed", range(20))
def test_killers_are_told_from_dying_nodes_and_chance(seed: int) -> None:
    rng = random.Random(seed)

    def fates(actor: Actor, answers: int) -> Exception | None:
        if rng.random() > 0.12:
            return None
        return rng.choice([ActorDiedError(NODE), ActorUnavailableError("?"), ActorDiedError("killed by somebody")])

    killers = ["u1-0", "u5-2"]
    ray = FakeRay(killers, seed=seed, fates=fates)
    assert work(ray, units=10, actors=3) == killers


def test_a_users_mistake_comes_out_as_itself_and_our_own_bug_with_its_traceback() -> None:
    ray = FakeRay()
    ray.error = UserError("no such layer")
    with pytest.raises(UserError, match="no such layer"):
        work(ray)
    ray = FakeRay()
    ray.error = KeyError("ours")
    with pytest.raises(RayTaskError):
        work(ray)


def test_processes_that_die_at_their_start_end_the_job() -> None:
    ray = FakeRay(fates=lambda actor, answers: None if actor.loaded else ActorDiedError("SIGSEGV in the driver"))
    with pytest.raises(UserError, match=r"died 20 times at their start.*SIGSEGV in the driver"):
        work(ray)


def test_nodes_that_die_at_an_actors_start_do_not() -> None:
    ray = FakeRay(fates=lambda actor, answers: ActorDiedError(NODE) if answers < 60 else None)
    assert work(ray) == []
