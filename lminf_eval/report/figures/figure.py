"""One figure: how it line_styles, and how it is written."""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure

from lminf_eval.report.escape import plain, shorten
from lminf_eval.report.figures.style import INK

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

SETTINGS: dict[RcKeyType, Any] = {
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "font.size": 9.5,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same figure everywhere
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "text.parse_math": False,  # a dollar sign in a name is no formula
    "svg.fonttype": "none",  # text stays text: small, selectable, read aloud
    "svg.hashsalt": "lminf",  # the same figure is the same file
}


@dataclass(frozen=True)
class Plot:
    """One figure: `name` for a file, `caption` for what it shows and how to read it."""

    name: str
    title: str
    caption: str
    figure: Figure

    def svg(self) -> str:
        """Return the figure as an SVG document with a transparent background."""
        out = io.StringIO()
        self._save(out, format="svg", transparent=True, metadata={"Date": None})
        return out.getvalue()

    def write(self, folder: Path) -> list[Path]:
        """Write `name`.png (200 dots an inch) and `name`.svg into `folder`, on white."""
        files = [folder / f"{self.name}.png", folder / f"{self.name}.svg"]
        self._save(files[0], dpi=200)
        self._save(files[1], metadata={"Date": None})
        return files

    def _save(self, to: Path | IO[str], **options: Any) -> None:
        with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # an emoji in a name is drawn as a box
            self.figure.savefig(to, bbox_inches="tight", **options)


def slug(*parts: str) -> str:
    """Return a file name that has only letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")[:80]


def short_method(method: str) -> str:
    """Return a method's name, shortened to the room that figures have."""
    return shorten(plain(method), 34)
