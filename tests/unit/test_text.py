"""The normalisers' written rule, example by example."""

from __future__ import annotations

import random
import sys

import pytest

from sm_train.data.text import NORMALISERS, normalise
from sm_train.errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, World!", "hello world"),
        ("  two\t\nlines ", "two lines"),
        ("Don't, l\u2019homme; 'tis the dogs' tail", "don't l'homme tis the dogs tail"),
        ("rock''n''roll ''", "rock n roll"),
        ("<b>bold</b> &amp; a<br/>new line<!-- no -->", "bold a new line"),
        ("3 < 4 and 5 > 2", "3 4 and 5 2"),
        ("well-known snake_case", "well known snake case"),
        ("Größe ÉTÉ straße", "größe été straße"),
        ("e\u0301te\u0301", "été"),
        ("\uff46\uff55\uff4c\uff4c\u3000\uff57ide \ufb01ne", "full wide fine"),
        ("नमस्ते, दुनिया।", "नमस्ते दुनिया"),
        ("zero\u200bwidth soft\u00adhyphen", "zerowidth softhyphen"),
        ("(Sam 23:17) paid 40 €", "sam 23 17 paid 40"),
        ("¿Qué?", "qué"),
        ("", ""),
        ("...", ""),
    ],
)
def test_mms_rule(text: str, expected: str) -> None:
    assert normalise(text, "mms") == expected


def test_mms_twice_is_mms_once() -> None:
    choice = random.Random(5)
    alphabet = "aZ '\u2019\"-_<>/&;b1ß\u0301\u200dİΣfiﬁ½٣。\u00a8 " + "".join(
        chr(choice.randrange(0x20, min(0xD7FF, sys.maxunicode))) for _ in range(400)
    )
    for _ in range(3000):
        once = normalise("".join(choice.choices(alphabet, k=12)), "mms")
        assert normalise(once, "mms") == once
        assert once == once.strip()
        assert "  " not in once


def test_none_changes_nothing() -> None:
    assert normalise(" As <b>IS</b>! ", "none") == " As <b>IS</b>! "


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"whisper.*mms, none"):
        normalise("x", "whisper")
    assert set(NORMALISERS) == {"mms", "none"}
