"""The figures: NLL against position, perplexity against length, passkey accuracy by depth and length.

Every figure can be read in grey and with any colour vision: lines differ in marker and dash as well as colour and are
labelled at their ends, heat maps print their numbers.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from lminf_eval.results.curves import hits_by_depth, nll_by_position
from lminf_eval.results.describe import length_label
from lminf_eval.results.escape import plain, shorten
from lminf_eval.results.evidence import Evidence
from lminf_eval.results.load import DIVERGED_PERPLEXITY
from lminf_eval.results.style import GRID, INK, Style, styles

SETTINGS = {
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
PANELS_A_ROW = 4
MOST_BANDS = 6  # intervals of more lines than that hide one another
LEADER = {"arrowstyle": "-", "linewidth": 0.8, "shrinkA": 0, "shrinkB": 2, "relpos": (0, 0.5)}
LABEL_GAP = 11  # points between two labels at lines' ends


@dataclass(frozen=True)
class Plot:
    """One figure: `name` for a file, `caption` for what it shows and how to read it."""

    name: str
    title: str
    caption: str
    figure: Figure

    def svg(self) -> str:
        """The figure as an SVG document with a transparent background."""
        out = io.StringIO()
        self._save(out, format="svg", transparent=True, metadata={"Date": None})
        return out.getvalue()

    def write(self, folder: Path) -> list[Path]:
        """Write `name`.png (200 dots an inch) and `name`.svg into `folder`, on white."""
        files = [folder / f"{self.name}.png", folder / f"{self.name}.svg"]
        self._save(files[0], dpi=200)
        self._save(files[1], metadata={"Date": None})
        return files

    def _save(self, to, **options) -> None:
        with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # an emoji in a name is drawn as a box
            self.figure.savefig(to, bbox_inches="tight", **options)


def plots(evidence: Evidence) -> list[Plot]:
    """Every figure that the results allow: the kinds of this module, for each model and family of tasks."""
    results = evidence.collection.results
    looks = styles(results["method"])
    made = []
    with matplotlib.rc_context(SETTINGS):
        for kind in (_nll_against_position, _perplexity_against_length, _passkey_heat_maps):
            for (model, family), group in results.groupby(["model", "family"], sort=True):
                plot = kind(evidence, group, looks, f"{shorten(plain(model), 40)}, {shorten(plain(family), 40)}")
                made += [plot] if plot else []
    return [_named_apart(plot, made[:i]) for i, plot in enumerate(made)]


def _named_apart(plot: Plot, before: list[Plot]) -> Plot:
    same = sum(other.name == plot.name for other in before)
    return Plot(f"{plot.name}_{same + 1}", plot.title, plot.caption, plot.figure) if same else plot


def _name(*parts: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")[:80]


def _nll_against_position(evidence: Evidence, group: pd.DataFrame, looks: dict[str, Style], about: str) -> Plot | None:
    curves = {}
    for method, results in group.sort_values("length", ascending=False).groupby("method"):
        for _, result in results.drop_duplicates(["run", "task"]).iterrows():
            samples = evidence.samples(result["run"], result["task"])
            curve = nll_by_position(samples) if samples is not None else pd.DataFrame()
            if len(curve) > 1:
                curves[method] = curve
                break  # the longest text tells the most
    if not curves:
        return None
    documents = max(int(curve["documents"].max()) for curve in curves.values())
    banded = documents > 1 and len(curves) <= MOST_BANDS
    figure, axes = _canvas()
    ends = []
    for method, curve in curves.items():
        look, middle = looks[method], (curve["start"] + curve["end"]) / 2
        _line(axes, middle, curve["nll"], look)
        if banded:
            axes.fill_between(middle, curve["low"], curve["high"], color=look.color, alpha=0.15, linewidth=0)
        ends.append((method, middle.iloc[-1], curve["nll"].iloc[-1]))
    reach = max(curve["end"].max() for curve in curves.values())
    axes.set_xlim(0, reach)
    axes.set_xticks(*_round_positions(reach))
    axes.set_xlabel("position in the text (tokens)")
    axes.set_ylabel("negative log-likelihood (nats per token)")
    title = f"Loss against position: {about}"
    axes.set_title(title, pad=12)
    _trained_line(axes, group)
    _label_ends(axes, ends, looks)
    caption = (
        f"Mean negative log-likelihood of the tokens at each position, over {documents} "
        f"document{'s' if documents > 1 else ''}; lower is better. Points are at the middle of their stretch of text. "
        + ("Bands: 95% bootstrap intervals over documents." if banded else "")
    )
    return Plot(_name("nll", about), title, caption.strip(), figure)


def _perplexity_against_length(
    evidence: Evidence, group: pd.DataFrame, looks: dict[str, Style], about: str
) -> Plot | None:
    of_metric = group[(group["metric"] == "token_perplexity") & group["length"].notna()]
    if of_metric["length"].nunique() < 2:
        return None
    figure, axes = _canvas()
    ends, gone = [], 0
    for method, results in of_metric.groupby("method"):
        results = results.sort_values("length").drop_duplicates("length", keep="last")
        fine = results["diverged"] == ""
        look = looks[method]
        _line(axes, results["length"], results["value"].where(fine), look)
        if fine.any():
            last = results[fine].iloc[-1]
            ends.append((method, last["length"], last["value"]))
        if not fine.all():
            # Stacked above the axes, so that methods that fail at the same length stay apart.
            height = [1.02 + 0.04 * gone] * int((~fine).sum())
            at = axes.get_xaxis_transform()
            axes.plot(
                results.loc[~fine, "length"],
                height,
                transform=at,
                marker=look.marker,
                color=look.color,
                linestyle="",
                markerfacecolor="none",
                clip_on=False,
            )
            axes.annotate(
                f"{_short(method)} diverged",
                (1, height[0]),
                xycoords="axes fraction",
                xytext=(10, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
            )
            gone += 1
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    if gone:
        axes.set_ylim(top=min(axes.get_ylim()[1] * 1.5, DIVERGED_PERPLEXITY))
    lengths = sorted(of_metric["length"].unique())
    axes.set_xticks(lengths, [length_label(length) for length in lengths])
    axes.minorticks_off()
    axes.set_yticks(*_round_values(*axes.get_ylim()))
    axes.set_xlabel("length of the text (tokens)")
    axes.set_ylabel("perplexity per token")
    title = f"Perplexity against length: {about}"
    axes.set_title(title, pad=12 + 14 * gone)
    _trained_line(axes, group)
    _label_ends(axes, ends, looks)
    caption = "Perplexity per token of whole texts of each length; lower is better; both axes are logarithmic."
    if gone:
        caption += " Hollow marks above the axes: no number, or a perplexity over 1000."
    return Plot(_name("perplexity", about), title, caption, figure)


def _passkey_heat_maps(evidence: Evidence, group: pd.DataFrame, looks: dict[str, Style], about: str) -> Plot | None:
    panels = {}
    for (method, length), results in group[group["metric"] == "acc"].groupby(["method", "length"]):
        samples = evidence.samples(results.iloc[-1]["run"], results.iloc[-1]["task"])
        found = hits_by_depth(samples, "acc") if samples is not None else pd.DataFrame()
        if len(found):
            panels.setdefault(method, {})[length] = found
    if not panels:
        return None
    lengths = sorted({length for panel in panels.values() for length in panel})
    depths = sorted({depth for panel in panels.values() for found in panel.values() for depth in found["depth"]})
    across = min(len(panels), PANELS_A_ROW)
    down = math.ceil(len(panels) / across)
    size = (1.2 + across * max(1.9, 0.5 * len(lengths) + 0.3), 0.9 + down * (0.75 + 0.26 * max(len(depths), 4)))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for axes, (method, panel) in zip(grid.flat, sorted(panels.items()), strict=False):
        axes.set_title(_short(method), fontsize=9)
        _heat_map(axes, panel, lengths, depths)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("depth of the key")
    for column in range(across):
        lowest = grid[(len(panels) - 1 - column) // across, column]
        lowest.set_xlabel("length (tokens)")
        lowest.tick_params(labelbottom=True)
    title = f"Passkeys found: {about}"
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    caption = (
        "Passkeys found of those hidden, by length of the text and depth of the key in it (0% is its start): "
        "light cells found all, dark ones none. Hatched cells were not measured."
    )
    return Plot(_name("passkey", about), title, caption, figure)


def _heat_map(axes: Axes, panel: dict[float, pd.DataFrame], lengths: list[float], depths: list[float]) -> None:
    colors, shade = matplotlib.colormaps["cividis"], Normalize(0, 1)  # its lightness rises evenly: it reads in grey
    axes.set_xlim(-0.5, len(lengths) - 0.5)
    axes.set_ylim(len(depths) - 0.5, -0.5)
    axes.set_xticks(range(len(lengths)), [length_label(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for x, length in enumerate(lengths):
        found = panel.get(length)
        rows = {} if found is None else {row.depth: row for row in found.itertuples()}
        for y, depth in enumerate(depths):
            corner = (x - 0.5, y - 0.5)
            if depth not in rows:
                axes.add_patch(Rectangle(corner, 1, 1, fill=False, hatch="///", edgecolor=GRID, linewidth=0))
                continue
            share = rows[depth].hits / rows[depth].documents
            axes.add_patch(Rectangle(corner, 0.96, 0.94, color=colors(shade(share)), linewidth=0))
            told = f"{rows[depth].hits:g}/{rows[depth].documents}"
            axes.text(x, y, told, ha="center", va="center", fontsize=7, color="#ffffff" if share < 0.5 else "#000000")


def _canvas() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 3.6))
    axes = figure.subplots()
    axes.grid(axis="y", color=GRID, alpha=0.3, linewidth=0.7)
    return figure, axes


def _line(axes: Axes, x: pd.Series, y: pd.Series, look: Style) -> None:
    every = max(1, len(x) // 12)
    axes.plot(x, y, color=look.color, marker=look.marker, linestyle=look.line, markevery=every)


def _short(method: str) -> str:
    return shorten(plain(method), 34)


def _round_positions(reach: float) -> tuple[list[int], list[str]]:
    step = 2 ** max(0, math.ceil(math.log2(reach / 8)))
    ticks = list(range(0, int(reach) + 1, step))
    return ticks, [length_label(tick) for tick in ticks]


def _round_values(low: float, high: float) -> tuple[list[float], list[str]]:
    """Ticks of a logarithmic axis that spans little or much."""
    if high / low < 5:
        ticks = [tick for tick in MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= tick <= high]
    else:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5) if low <= digit * 10.0**power <= high]
    return ticks, [f"{tick:g}" for tick in ticks]


def _trained_line(axes: Axes, group: pd.DataFrame) -> None:
    trained = group["trained_length"].max()
    low, high = axes.get_xlim()
    if math.isnan(trained) or not low < trained < high:
        return
    axes.axvline(trained, color=INK, linewidth=1, linestyle=(0, (2, 2)))
    axes.annotate(
        f"trained at {length_label(trained)}",
        (trained, 0.99),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        va="top",
        fontsize=8,
    )


def _label_ends(axes: Axes, ends: Iterator[tuple[str, float, float]], looks: dict[str, Style]) -> None:
    """Each line's name at its right end, moved up or down as far as the names need to be apart."""
    ends = [end for end in ends if math.isfinite(end[2])]
    scale = 72 / axes.figure.dpi
    heights = [axes.transData.transform(end[1:])[1] * scale for end in ends]  # points from the figure's foot
    edge = axes.get_window_extent().x1 * scale
    for at, wanted in zip(np.argsort(heights), _spread(sorted(heights)), strict=True):
        method, x, y = ends[at]
        here = axes.transData.transform((x, y))[0] * scale
        axes.annotate(
            _short(method),
            (x, y),
            xytext=(edge - here + 10, wanted - heights[at]),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            annotation_clip=False,
            arrowprops=LEADER | {"color": looks[method].color},
        )


def _spread(heights: list[float]) -> list[float]:
    """The ascending `heights`, moved as little as puts `LABEL_GAP` between neighbours."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _lowest(groups[-1]) < _lowest(groups[-2]) + LABEL_GAP * len(groups[-2]):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_lowest(group) + i * LABEL_GAP for group in groups for i in range(len(group))]


def _lowest(group: list[float]) -> float:
    return sum(group) / len(group) - LABEL_GAP * (len(group) - 1) / 2
