"""Rank 0's end and the others', over real connections, in one process and turn by turn."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from sm_train.errors import UserError
from sm_train.train.engines import pulse
from sm_train.train.engines.pulse import Centre, Spoke, connect, listen
from sm_train.train.engines.verdict import Verdict
from tests.training import free_port


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "TURN_S", 0.01)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


@pytest.fixture
def centre() -> Iterator[Centre]:
    made = listen(3, heartbeat_s=2, timeout_s=600)
    made.begin()
    yield made
    made.listener.close()


@pytest.fixture
def spokes(centre: Centre) -> list[Spoke]:
    made = [connect(rank, *centre.place, heartbeat_s=2) for rank in (1, 2)]
    assert both(centre, made) == [None, None, None]
    return made


def both(centre: Centre, spokes: list[Spoke], turns: int = 3) -> list[Verdict | None]:
    """Some turns of all ends; the first verdict of each."""
    ends: list[Centre | Spoke] = [centre, *spokes]
    found: list[Verdict | None] = [None] * len(ends)
    for _ in range(turns):
        for i, end in enumerate(ends):
            found[i] = found[i] or end.turn(5, "step")
            if found[i] and end is centre:
                centre.announce(found[i])  # type: ignore[arg-type]
    return found


def test_ranks_learn_of_each_other(centre: Centre, spokes: list[Spoke]) -> None:
    assert [(m.marks, m.doing) for m in centre.members] == [(5, "step")] * 3
    assert all("pid" in m.place for m in centre.members)
    assert spokes[0].centre.place == centre.members[0].place


def test_a_connection_that_ends_is_a_death_that_all_learn_of(centre: Centre, spokes: list[Spoke]) -> None:
    spokes[1].link.connection.close()
    found = both(centre, spokes[:1])
    assert found[0] is not None
    assert "rank 2" in found[0].text
    assert found[1] == found[0]


def test_a_last_word_is_told_to_all(centre: Centre, spokes: list[Spoke]) -> None:
    spokes[1].finish("ValueError: mine")
    found = both(centre, spokes[:1])
    assert found[0] is not None
    assert found[0].text.endswith("left: ValueError: mine")
    assert found[0].is_last_word
    assert found[1] == found[0]


def test_rank_0_s_last_word_reaches_the_others_before_its_connection_ends(centre: Centre, spokes: list[Spoke]) -> None:
    centre.finish("ValueError: mine")
    for link in centre.links:
        link.connection.close()
    for spoke in spokes:
        found = spoke.turn(5, "step")
        assert found is not None
        assert found.text.startswith("rank 0 (host")
        assert found.text.endswith("left: ValueError: mine")


def test_without_a_word_rank_0_is_gone_or_silent(centre: Centre, spokes: list[Spoke]) -> None:
    spokes[0].heard_s -= 2.1
    silent = spokes[0].turn(5, "step")
    assert silent is not None
    assert silent.text.endswith("has not been heard from for 2 s")
    for link in centre.links:
        link.connection.close()
    gone = spokes[1].turn(5, "step")
    assert gone is not None
    assert gone.text.endswith("is gone: its process ended without a word")


def test_a_normal_end_is_no_death_whoever_is_first(centre: Centre, spokes: list[Spoke]) -> None:
    first = threading.Thread(target=spokes[0].finish, args=(None,))
    first.start()
    while first.is_alive():
        assert both(centre, spokes[1:]) == [None, None]
    assert centre.members[1].is_done
    centre.members[2].is_done = True  # so that rank 0 does not wait for it
    centre.finish(None)
    for _ in range(3):
        assert spokes[1].turn(5, "step") is None


def test_a_rank_that_never_comes_is_missed(centre: Centre) -> None:
    spoke = connect(1, *centre.place, heartbeat_s=2)
    centre.members[2].heard_s -= 2.1
    found = both(centre, [spoke])[0]
    assert found == Verdict("rank 2 has not been heard from for 2 s")


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n\r\n", b'{"token": 1, "rank": 1}\n', b"[]\n", b"x" * 200_000])
def test_a_stranger_changes_nothing(centre: Centre, spokes: list[Spoke], noise: bytes) -> None:
    with socket.create_connection(("127.0.0.1", centre.place[0])) as stranger:
        stranger.setblocking(False)
        stranger.send(noise)
        assert both(centre, spokes, turns=6) == [None, None, None]
    assert both(centre, spokes) == [None, None, None]
    assert len(centre.links) == 2


def test_a_port_that_cannot_be_reached_is_a_users_error() -> None:
    with pytest.raises(UserError, match=r"rank 1 cannot reach rank 0 at 127.0.0.1, port \d+ .*engine.heartbeat_s=0"):
        connect(1, free_port(), 0, heartbeat_s=2)
