"""Figures as inline SVG, in the colours of the page they stand in. matplotlib is imported where one is drawn.

Shape letters: N positions, M token embeddings, D LLM width, 2 the axes of the picture.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = NDArray[np.floating[Any]]

# matplotlib knows no CSS variables: it draws in these colours, and the SVG's text then gets the page's own.
_INK, _MUTED, _RULE = "#010101", "#010102", "#010103"
_SERIES = ("#010111", "#010112", "#010113", "#010114", "#010115", "#010116")
_PAGE = {_INK: "var(--ink)", _MUTED: "var(--muted)", _RULE: "var(--rule)"}
_PAGE |= {colour: f"var(--c{number})" for number, colour in enumerate(_SERIES, start=1)}


@dataclass(frozen=True, slots=True)
class Projection:
    """Mapped positions among the token embeddings they are nearest to, seen along two axes."""

    mapped_N2: Floats
    labels: Sequence[str]
    """The nearest token of each position, N strings."""
    is_pad: NDArray[np.bool_]
    """Whether that token is the pad, [N]."""
    tokens_M2: Floats
    token_labels: Sequence[str]
    explained: tuple[float, float]
    """Share of the tokens' variance along each axis, 0 to 1."""


def project(
    mapped_ND: Floats, table_MD: Floats, token_labels: Sequence[str], pad_row: int, max_positions: int = 1500
) -> Projection:
    """The two principal axes of those token embeddings that are nearest to some mapped position (in all D dimensions).

    ``token_labels`` names the rows of ``table_MD``, ``pad_row`` is the pad's. Of more than ``max_positions`` positions
    evenly spaced ones are taken. Raises :class:`ValueError` for no position, or shapes that do not fit.
    """
    if not len(mapped_ND) or mapped_ND.shape[1:] != table_MD.shape[1:] or len(token_labels) != len(table_MD):
        raise ValueError(f"positions {mapped_ND.shape}, table {table_MD.shape}, {len(token_labels)} labels do not fit")
    if len(mapped_ND) > max_positions:
        mapped_ND = mapped_ND[np.linspace(0, len(mapped_ND) - 1, max_positions).astype(np.intp)]
    mapped, table = np.asarray(mapped_ND, np.float32), np.asarray(table_MD, np.float32)
    squares_M = np.einsum("md,md->m", table, table)
    pieces = np.array_split(mapped, 1 + len(mapped) // 256)
    nearest_N = np.concatenate([np.argmin(squares_M - 2 * piece @ table.T, axis=1) for piece in pieces])
    rows = np.unique(nearest_N)
    centre = table[rows].mean(axis=0)
    _, spread, axes = np.linalg.svd(table[rows] - centre, full_matrices=False)
    axes_2D = np.zeros((2, table.shape[1]), np.float32)
    axes_2D[: len(axes[:2])] = axes[:2]
    # The sign of a principal axis is arbitrary: its largest entry is made positive, so that runs look alike.
    largest = np.abs(axes_2D).argmax(axis=1)
    axes_2D *= np.where(axes_2D[[0, 1], largest] < 0, -1, 1)[:, None]
    variance = np.append(spread**2, (0.0, 0.0))
    shares = variance[:2] / max(float(variance.sum()), np.finfo(np.float32).tiny)
    return Projection(
        mapped_N2=(mapped - centre) @ axes_2D.T,
        labels=[token_labels[row] for row in nearest_N],
        is_pad=nearest_N == pad_row,
        tokens_M2=(table[rows] - centre) @ axes_2D.T,
        token_labels=[token_labels[row] for row in rows],
        explained=(float(shares[0]), float(shares[1])),
    )


def projection_svg(picture: Projection, max_labels: int = 40) -> str:
    """The picture as an ``<svg>`` element: crosses are token embeddings, dots are mapped positions, lines join them."""

    def draw(axes: Axes) -> None:
        places = dict(zip(picture.token_labels, picture.tokens_M2, strict=True))
        for label, (x, y) in zip(picture.labels, picture.mapped_N2, strict=True):
            if label in places:
                axes.plot([x, places[label][0]], [y, places[label][1]], color=_RULE, linewidth=0.6, zorder=1)
        for pad, colour, name in ((False, _SERIES[0], "mapped, a word"), (True, _SERIES[1], "mapped, the pad")):
            chosen = picture.mapped_N2[picture.is_pad == pad]
            if len(chosen):
                label = f"{name} ({len(chosen)})"
                axes.plot(*chosen.T, "o", markersize=3.2, color=colour, alpha=0.65, markeredgewidth=0, label=label)
        name = f"token embedding ({len(picture.tokens_M2)})"
        axes.plot(*picture.tokens_M2.T, "x", markersize=5, markeredgewidth=1.1, color=_INK, label=name, zorder=3)
        for index in _apart(picture, max_labels):
            text = _printable(picture.token_labels[index])
            at = tuple(picture.tokens_M2[index])
            axes.annotate(text, at, xytext=(5, 3), textcoords="offset points", fontsize=8, color=_INK, zorder=4)
        axes.set_xlabel(f"first axis ({picture.explained[0]:.0%} of the tokens' variance)")
        axes.set_ylabel(f"second axis ({picture.explained[1]:.0%})")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.09), ncols=3, frameon=False, labelcolor=_INK)
        axes.margins(0.06)

    return _svg("projection", (9.2, 5.6), draw)


def _apart(picture: Projection, max_labels: int) -> list[int]:
    """Tokens to label: those with the most positions first, none closer to a labelled one than its text is wide."""
    uses = Counter(picture.labels)
    order = sorted(range(len(picture.token_labels)), key=lambda index: (-uses[picture.token_labels[index]], index))
    extent = np.ptp(np.concatenate([picture.tokens_M2, picture.mapped_N2]), axis=0)
    scaled_M2 = picture.tokens_M2 / np.where(extent > 0, extent, 1)
    chosen: list[int] = []
    for index in order:
        away = [np.abs(scaled_M2[index] - scaled_M2[other]) for other in chosen]
        if all(x > 0.075 or y > 0.03 for x, y in away):
            chosen.append(index)
        if len(chosen) == max_labels:
            break
    return chosen


def curve_svg(
    name: str, title: str, curves: dict[str, tuple[Floats, Floats]], marks: Sequence[float] = (), log: bool = False
) -> str:
    """Curves of a quantity over steps as an ``<svg>`` element.

    ``name``: unique on the page. ``curves``: (steps, values) by legend text, which may be empty. ``marks``: steps with
    a dotted vertical line (a new attempt). ``log``: logarithmic values; all must be positive then.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    def draw(axes: Axes) -> None:
        for (label, (steps, values)), colour in zip(curves.items(), _SERIES * (1 + len(curves)), strict=False):
            few = "o-" if len(steps) <= 40 else "-"
            axes.plot(*_thinned(steps, values), few, markersize=3, linewidth=1.5, color=colour, label=label)
        for step in marks:
            axes.axvline(step, color=_MUTED, linewidth=0.8, linestyle=":")
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        elif all(np.all(values >= 0) for _, values in curves.values()):
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.set_title(title, loc="left", fontsize=10, color=_INK, fontweight="bold")
        axes.set_xlabel("step")
        if any(curves):
            axes.legend(frameon=False, labelcolor=_INK, fontsize=8.5, loc="best")

    return _svg(name, (5.0, 3.0), draw)


def _thinned(steps: Floats, values: Floats, most: int = 400) -> tuple[Floats, Floats]:
    """At most ``most`` points: means of equal runs of neighbours."""
    if len(steps) <= most:
        return steps, values
    cuts = np.linspace(0, len(steps), most + 1).astype(np.intp)[:-1]
    sizes = np.diff(np.append(cuts, len(steps)))
    return np.add.reduceat(steps, cuts) / sizes, np.add.reduceat(values, cuts) / sizes


def _printable(token: str) -> str:
    """A token without the marks by which tokenizers write a leading space, and without control characters."""
    text = token.lstrip("\u2581\u0120 ") or token
    return "".join(character if character.isprintable() else "\u00b7" for character in text)


def _svg(name: str, inches: tuple[float, float], draw: Any) -> str:
    """``draw(axes)`` on a bare figure, as SVG that takes the page's fonts and colours; the same bytes every time."""
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text: small, searchable, and a token may be in a script that matplotlib has no font for.
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "font.size": 9}
    style |= {"axes.edgecolor": _RULE, "axes.labelcolor": _MUTED, "xtick.color": _MUTED, "ytick.color": _MUTED}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True}
    style |= {"grid.color": _RULE, "grid.linewidth": 0.5, "axes.unicode_minus": True}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=inches, layout="constrained")
        draw(figure.add_subplot())
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = drawn.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    head, body = svg.split(">", 1)
    head = re.sub(r' (width|height|version)="[^"]*"', "", head)
    svg = f'{head} class="{name}" role="img">{body}'
    svg = re.sub(r"(\bid=\"|url\(#|href=\"#)", rf"\g<1>{name}-", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", svg)
    for drawn_colour, page_colour in _PAGE.items():
        svg = svg.replace(drawn_colour, page_colour)
    return svg.strip()
