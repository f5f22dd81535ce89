"""Which rank is to blame."""

from __future__ import annotations

import pytest

from sm_train.train.engines.verdict import Member, Verdict, judge

NOW_S, HEARTBEAT_S, TIMEOUT_S = 1000.0, 10.0, 600.0


def members(count: int = 3, marks: int = 7) -> list[Member]:
    return [Member(r, NOW_S, NOW_S, f"host h, pid {100 + r}", marks, "step") for r in range(count)]


def verdict(ranks: list[Member]) -> Verdict | None:
    return judge(ranks, NOW_S, HEARTBEAT_S, TIMEOUT_S)


def test_ranks_at_work_are_left_alone() -> None:
    ranks = members()
    ranks[1].heard_s -= HEARTBEAT_S  # just in time
    ranks[2].moved_s -= TIMEOUT_S
    ranks[0].marks += 5  # ahead, and yet nobody has waited too long
    assert verdict(ranks) is None


@pytest.mark.parametrize(
    ("change", "text", "is_last_word"),
    [
        ({"last_word": "ValueError: x"}, "rank 1 (host h, pid 101) left: ValueError: x", True),
        ({"is_gone": True}, "rank 1 (host h, pid 101) is gone: its process ended without a word", False),
        ({"heard_s": NOW_S - 10.1}, "rank 1 (host h, pid 101) has not been heard from for 10 s", False),
        ({"heard_s": NOW_S - 10.1, "place": ""}, "rank 1 has not been heard from for 10 s", False),
    ],
)
def test_a_rank_is_named(change: dict[str, object], text: str, is_last_word: bool) -> None:
    ranks = members()
    for name, value in change.items():
        setattr(ranks[1], name, value)
    assert verdict(ranks) == Verdict(text, is_last_word)


def test_a_rank_that_is_done_is_never_named() -> None:
    ranks = members()
    ranks[1].is_done, ranks[1].is_gone, ranks[1].heard_s, ranks[1].moved_s = True, True, 0.0, 0.0
    assert verdict(ranks) is None


def test_the_cause_comes_before_what_follows_from_it() -> None:
    ranks = members()
    ranks[0].heard_s = 0.0
    ranks[1].is_gone = True
    ranks[2].last_word = "UserError: y"
    found = verdict(ranks)
    assert found is not None
    assert found.text.startswith("rank 2")
    ranks[2].last_word = None
    found = verdict(ranks)
    assert found is not None
    assert found.text.startswith("rank 1")


def test_the_rank_with_the_fewest_marks_hangs_though_others_have_waited_longer() -> None:
    ranks = members()
    ranks[0].moved_s, ranks[0].marks, ranks[0].doing = NOW_S - 601, 9, "sum_over_ranks"
    ranks[2].moved_s, ranks[2].doing = NOW_S - 30, "forward"
    ranks[1].marks = 9
    assert verdict(ranks) == Verdict(
        "rank 2 (host h, pid 102) hangs: at mark 7 (forward) for 30 s, while others wait at mark 9 (sum_over_ranks)"
    )


def test_several_that_are_behind_are_all_named() -> None:
    ranks = members()
    ranks[0].marks, ranks[0].moved_s = 8, NOW_S - 601
    found = verdict(ranks)
    assert found is not None
    assert found.text.startswith("rank 1 (host h, pid 101) and rank 2 (host h, pid 102) hang: at mark 7")


def test_nobody_is_blamed_where_all_wait_at_one_mark() -> None:
    ranks = members()
    ranks[1].moved_s = NOW_S - 601
    assert verdict(ranks) == Verdict("all ranks hang: none has gone on from mark 7 (step) for 600 s")


def test_a_pulse_without_a_new_mark_is_no_progress() -> None:
    member = Member(0, 0.0, 0.0, marks=3, doing="forward")
    member.hear(5.0, 3, "forward")
    assert (member.heard_s, member.moved_s) == (5.0, 0.0)
    member.hear(6.0, 4, "step")
    assert (member.heard_s, member.moved_s, member.doing) == (6.0, 6.0, "step")
