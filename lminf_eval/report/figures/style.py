"""How a method looks in every figure: a colour, a marker and a line of its own, wherever it is drawn."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from lminf_eval.methods.registry import METHODS

if TYPE_CHECKING:
    from matplotlib.typing import LineStyleType

INK = "#1b1b1b"  # text, axes and the model as it is; a page may set it to its own text colour
GRID = "#8c8c8c"
# Okabe and Ito, "Color Universal Design" (2008): told apart by people with any colour vision deficiency. Black is INK.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, YELLOW = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7"),
    *("#E69F00", "#56B4E9", "#F0E442"),
)


@dataclass(frozen=True)
class Style:
    """A matplotlib colour, marker and line style; the last two tell lines apart in grey."""

    color: str
    marker: str
    line: LineStyleType


_HF = Style(PURPLE, "v", (0, (5, 1)))
FURTHER_COLORS = (ORANGE, SKY, PURPLE, VERMILION, GREEN, BLUE, YELLOW)
FURTHER_MARKERS = ("P", "X", "<", ">", "p", "h", "*", "d", "8", "H")
FURTHER_LINES: tuple[LineStyleType, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))


def style_of(attention: str) -> Style | None:
    """Return how the first method of an attention looks, if it says so itself."""
    if attention == "hf":
        return _HF
    method = METHODS.get(attention)
    return own_style(attention) if method and method.color else None


def own_style(attention: str) -> Style:
    """Return how the first method of an attention looks that says so itself."""
    method = METHODS[attention]
    return Style(method.color, method.marker, cast("LineStyleType", method.line))


def assign_styles(methods: Iterable[str]) -> dict[str, Style]:
    """Assign each method a style, always the same for the same set of methods.

    The first method of an attention gets that attention's; the others take the next of the further ones.
    """
    given: dict[str, Style] = {}
    further = 0
    for method in sorted(set(methods)):
        style = style_of(method.partition(" ")[0])
        if style is None or style in given.values():
            style = Style(
                FURTHER_COLORS[further % len(FURTHER_COLORS)],
                FURTHER_MARKERS[further % len(FURTHER_MARKERS)],
                FURTHER_LINES[further % len(FURTHER_LINES)],
            )
            further += 1
        given[method] = style
    return given
