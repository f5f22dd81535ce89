"""Text normalisers: what two texts must agree on to count as the same. Pure functions, named in configs.

A normaliser is part of the contract of a target set and of every score, so its rule is written down here and a change
of the rule needs a new name. ``none`` returns the text as it is.

The rule of ``mms``, in this order:

1. HTML entities are resolved (``&amp;`` -> ``&``), then every tag (``<b>``, ``</p>``, ``<br/>``, ``<!-- -->``) becomes
   a space; a lone ``<`` as in ``a < b`` is no tag.
2. Unicode NFKC, then lower case (full Unicode lower-casing, no case folding: German ``ß`` stays).
3. Invisible format characters (category Cf: zero-width spaces and joiners, direction marks, soft hyphens) are deleted.
4. Letters, marks and numbers of any script (categories L, M, N) are kept. Apostrophes (U+0027, U+2018, U+2019, U+201B,
   U+02BC, U+FF07) become U+0027 and stay between two kept characters (``don't``, ``l'homme``); at an edge they go.
5. All else, punctuation (the underscore and hyphens too), symbols and control characters, becomes a space.
6. Runs of white space become one space, the ends are stripped, and the result is NFKC again (step 3 can bring a letter
   and its mark together). So the rule applied twice is the rule applied once.

It follows the normaliser of MMS (fairseq), the one that the SpeechMapper and ACIF papers name. Where those two differ
from each other, or would lose words, this one keeps them: MMS drops words made of digits and brackets that hold a
digit, we keep both; ACIF's code deletes punctuation instead of spacing it (``well-known`` -> ``wellknown``), drops
apostrophes, and drops combining marks (``\\w`` does not match them, which breaks Hindi or Thai); we do none of these.
On plain English the differences are apostrophes, hyphens and digits: small, yet not comparable to the last decimal.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable

from sm_train.errors import UserError

_APOSTROPHES = frozenset("'\u2018\u2019\u201b\u02bc\uff07")
_TAG = re.compile(r"<!--.*?-->|</?[A-Za-z][^<>]*>", re.DOTALL)
_EDGE_APOSTROPHE = re.compile(r"(?<![^\s'])'|'(?![^\s'])")


class _Kept(dict[int, str]):
    """A table for ``str.translate`` that decides each code point once, when it first occurs."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if character in _APOSTROPHES:
            kept = "'"
        elif category[0] in "LMN":
            kept = character
        else:
            kept = "" if category == "Cf" else " "
        self[code] = kept
        return kept


_KEPT = _Kept()


def _mms(text: str) -> str:
    text = _TAG.sub(" ", html.unescape(text))
    text = unicodedata.normalize("NFKC", text).lower().translate(_KEPT)
    return unicodedata.normalize("NFKC", " ".join(_EDGE_APOSTROPHE.sub(" ", text).split()))


def _none(text: str) -> str:
    return text


NORMALISERS: dict[str, Callable[[str], str]] = {"mms": _mms, "none": _none}


def normalise(text: str, name: str) -> str:
    """``text`` under the normaliser called ``name``.

    Raises :class:`UserError` for a name that :data:`NORMALISERS` does not hold.
    """
    try:
        rule = NORMALISERS[name]
    except KeyError:
        raise UserError(f"unknown normaliser {name!r}; known are: {', '.join(sorted(NORMALISERS))}") from None
    return rule(text)
