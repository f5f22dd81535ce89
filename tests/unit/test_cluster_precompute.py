"""The loop that feeds actors, against a Ray that fails on command; the real one is in tests/integration."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import precompute
from sm_train.errors import UserError
from sm_train.models.speech import EncoderConfig
from sm_train.precompute import PrecomputeConfig
from sm_train.records import Receipt, Unit
from tests import builders

CFG = PrecomputeConfig("m.parquet", "out", EncoderConfig(path="e"))


class RayTaskError(Exception):
    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class RayActorError(Exception):
    pass


class ActorUnavailableError(RayActorError):
    pass


class ActorDiedError(RayActorError):
    pass


class FakeRay:
    """Actors that answer a call with what ``script`` holds for it, a receipt otherwise; never more than ``places``."""

    exceptions = SimpleNamespace(RayTaskError=RayTaskError, RayActorError=RayActorError, ActorDiedError=ActorDiedError)

    def __init__(self, script: dict[tuple[int, int], Exception] | None = None, places: int = 9) -> None:
        self.script, self.places, self.started = script or {}, places, 0
        self.most_in_flight = 0

    def remote(self, actor_class: type) -> Any:
        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=self.start))

    def start(self, cfg: PrecomputeConfig) -> Any:
        number, self.started = self.started, self.started + 1
        call = SimpleNamespace(
            ready=SimpleNamespace(remote=lambda: (number, None, object())),
            encode_unit=SimpleNamespace(remote=lambda unit: (number, unit, object())),
        )
        return _Actor(**vars(call))

    def wait(self, refs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        in_flight = Counter(number for number, unit, _ in refs if unit)
        self.most_in_flight = max(self.most_in_flight, *in_flight.values(), 0)
        placed = [ref for ref in refs if ref[0] < self.places]
        return placed[:1], []

    def get(self, ref: Any) -> Receipt | None:
        number, unit, _ = ref
        if unit is None:
            return None
        if error := self.script.pop((number, unit.index), None):
            raise error
        return Receipt(unit.part, 1, 0, 1.0, 1.0, 0.1, 1.2)


class _Actor(SimpleNamespace):
    __hash__ = object.__hash__


def work(ray: FakeRay, units: int = 7) -> list[str]:
    return sorted(r.part for r in precompute._work(ray, CFG, [Unit(i, ()) for i in range(units)]))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompute, "_PAUSE_S", 0.0)


WHOLE = [f"part-{i:07d}" for i in range(7)]


def test_every_unit_comes_back_once_and_few_are_in_flight() -> None:
    ray = FakeRay()
    assert work(ray) == WHOLE
    assert (ray.started, ray.most_in_flight) == (2, precompute._AHEAD)
    assert work(one := FakeRay(), units=1) == WHOLE[:1]
    assert one.started == 1


def test_an_actor_that_cannot_be_reached_gets_its_unit_again() -> None:
    ray = FakeRay({(0, 0): ActorUnavailableError(), (1, 2): ActorUnavailableError()})
    assert work(ray) == WHOLE
    assert ray.started == 2


def test_a_dead_actor_is_replaced_once_though_two_of_its_units_died() -> None:
    ray = FakeRay({(0, 0): ActorDiedError(), (0, 1): ActorDiedError()})
    assert work(ray) == WHOLE
    assert ray.started == 3


def test_actors_without_a_place_do_not_hold_the_job_up() -> None:
    assert work(FakeRay(places=1)) == WHOLE
    last_unit_of_a_dying_actor = FakeRay({(0, i): ActorDiedError() for i in range(7)}, places=2)
    assert work(last_unit_of_a_dying_actor) == WHOLE


def test_a_users_mistake_comes_out_as_itself_and_our_own_bug_with_its_traceback() -> None:
    with pytest.raises(UserError, match="no such layer"):
        work(FakeRay({(0, 0): RayTaskError(UserError("no such layer"))}))
    with pytest.raises(RayTaskError):
        work(FakeRay({(0, 0): RayTaskError(KeyError("ours"))}))


def test_actors_get_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e").mkdir()
    found = precompute._with_absolute_paths(CFG)
    assert (found.manifest, found.out) == (str(tmp_path / "m.parquet"), str(tmp_path / "out"))
    assert found.encoder.path == str(tmp_path / "e")
    hub = PrecomputeConfig("m", "o", EncoderConfig(path="facebook/seamless-m4t-v2-large"))
    assert precompute._with_absolute_paths(hub).encoder == hub.encoder


def test_importing_it_does_not_import_ray() -> None:
    code = "import sys, cluster.precompute; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=builders.child_env(), check=False).returncode == 0
