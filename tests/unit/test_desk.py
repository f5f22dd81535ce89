"""The desk: what nodes and driver learn of each other."""

from __future__ import annotations

from cluster.training.desk import Desk, News, Orders
from sm_train.errors import LOST

GO_ON = Orders(stop=False, code=None, all_ended=False)


def test_the_driver_hears_what_is_new_once() -> None:
    desk = Desk(2)
    assert desk.news() == News(0, False, b"", {})
    assert desk.begin("a", [0]) is False
    assert desk.news() == News(1, False, b"", {})
    desk.begin("a", [1])
    assert desk.exchange("a", {}, b"one\n") == GO_ON
    assert desk.exchange("a", {}, b"two\n") == GO_ON
    assert desk.news() == News(1, True, b"one\ntwo\n", {})
    assert desk.exchange("a", {1: (0, ""), 0: (0, "")}, b"") == Orders(False, None, True)
    assert desk.news() == News(1, False, b"", {})


def test_one_rank_s_mistake_is_the_code_of_all() -> None:
    desk = Desk(2)
    desk.begin("a", [0, 1])
    assert desk.exchange("a", {0: (LOST, "")}, b"") == GO_ON
    assert desk.exchange("a", {1: (2, "error: it")}, b"") == Orders(False, 2, True)
    assert desk.exchange("a", {}, b"") == Orders(False, 2, True)
    assert desk.news().ended == {0: (LOST, ""), 1: (2, "error: it")}


def test_a_new_attempt_forgets_the_codes_of_the_last_one_and_sends_its_nodes_home() -> None:
    desk = Desk(2)
    desk.begin("a", [0, 1])
    desk.exchange("a", {1: (-9, "")}, b"")
    desk.begin("b", [0])
    assert desk.news() == News(2, False, b"", {1: (-9, "")})
    assert desk.exchange("a", {0: (2, "late")}, b"late") == Orders(True, None, True)
    desk.begin("b", [1])
    assert desk.exchange("b", {}, b"") == GO_ON
    assert desk.news() == News(2, True, b"late", {})


def test_a_stop_is_told_to_all_also_before_they_begin() -> None:
    desk = Desk(1)
    desk.begin("a", [0])
    desk.stop()
    assert desk.exchange("a", {}, b"").stop
    assert desk.begin("b", [0])
