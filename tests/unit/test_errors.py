from __future__ import annotations

import pytest

from sm_train.errors import UserError, run_command


def test_a_users_mistake_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str]) -> None:
        raise UserError("the file\n  is not there")

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: the file is not there\n"


def test_our_own_bug_keeps_its_traceback() -> None:
    def main(argv: list[str]) -> None:
        raise KeyError("ours")

    with pytest.raises(KeyError):
        run_command(main)


def test_an_interrupt_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 130
    assert "run the same command again" in capsys.readouterr().err
