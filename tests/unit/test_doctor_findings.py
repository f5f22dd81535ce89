"""Checks are one line each, bounded, and do not stop one another."""

from __future__ import annotations

import threading

from cluster.doctor.findings import FAIL, OK, SKIP, Check, Finding, carry_out
from sm_train.errors import UserError


def test_a_line_and_what_to_do() -> None:
    assert str(Finding(OK, "disk", "room", "nothing")) == "ok    disk          room"
    assert str(Finding(FAIL, "disk", "no\nroom", "free some")) == "FAIL  disk          no\\nroom\n      free some"
    assert "\n" not in str(Finding(SKIP, "disk", "far away", "x"))


def test_a_check_that_hangs_fails_and_is_left_behind() -> None:
    release = threading.Event()
    found = carry_out(Check("slow", lambda: Finding(OK, "slow", str(release.wait(60))), 0.05))
    release.set()
    assert [(one.mark, one.name) for one in found] == [(FAIL, "slow")]
    assert "no answer within" in found[0].text


def test_what_a_check_raises_is_a_failure() -> None:
    def mistaken() -> Finding:
        raise UserError("run x does not exist; train it first")

    def broken() -> Finding:
        raise ZeroDivisionError("by zero")

    assert carry_out(Check("a", mistaken)) == [Finding(FAIL, "a", "run x does not exist", "train it first")]
    assert carry_out(Check("b", broken))[0].text == "ZeroDivisionError: by zero"
    many = Check("c", lambda: (Finding(OK, "c", str(i)) for i in range(2)))
    assert [one.text for one in carry_out(many)] == ["0", "1"]
