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


def test_what_an_artefact_says_cannot_steer_the_terminal_or_fill_it(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str]) -> None:
        raise UserError("id '\x1b[31mü\0" + "a" * 10**6)

    with pytest.raises(SystemExit):
        run_command(main)
    said = capsys.readouterr().err
    assert said.startswith("error: id '\\x1b[31mü\\x00aaa")
    assert said.endswith("a...\n")
    assert len(said) < 1100
