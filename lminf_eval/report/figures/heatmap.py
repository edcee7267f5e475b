"""The figure of facts found in a text, as passkeys are, by their depth and its length."""

from __future__ import annotations

import math

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lminf_eval.report.figures.curves import hits_by_depth
from lminf_eval.report.figures.figure import Plot, short_method, slug
from lminf_eval.report.figures.style import GRID, Style
from lminf_eval.report.frames import group_by_name, group_by_number
from lminf_eval.report.sample_store import SampleStore
from lminf_eval.utils.tokens import format_tokens

PANELS_A_ROW = 4


def heat_maps(store: SampleStore, group: pd.DataFrame, line_styles: dict[str, Style], subtitle: str) -> Plot | None:
    """Draw one panel a method, in the order of their names; every cell prints its numbers."""
    panels: dict[str, dict[float, pd.DataFrame]] = {}
    for method, of_method in group_by_name(group[group["metric"] == "acc"], "line"):
        for length, results in group_by_number(of_method[of_method["length"].notna()], "length"):
            samples = store.samples(results.iloc[-1]["run"], results.iloc[-1]["task"])
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
    grid: list[list[Axes]] = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).tolist()
    in_order = [axes for row in grid for axes in row]
    for axes, (method, panel) in zip(in_order, sorted(panels.items()), strict=False):
        axes.set_title(short_method(method), fontsize=9)
        _heat_map(axes, panel, lengths, depths)
    for axes in in_order[len(panels) :]:
        axes.set_visible(False)
    for row in grid:
        row[0].set_ylabel("depth in the text")
    for column in range(across):
        lowest = grid[(len(panels) - 1 - column) // across][column]
        lowest.set_xlabel("length (tokens)")
        lowest.tick_params(labelbottom=True)
    title = f"Found by depth: {subtitle}"
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    caption = (
        "Facts found of those asked for, by length of the text and their depth in it (0% is its start): "
        "light cells found all, dark ones none. Hatched cells were not measured."
    )
    return Plot(slug("depth", subtitle), title, caption, figure)


def _heat_map(axes: Axes, panel: dict[float, pd.DataFrame], lengths: list[float], depths: list[float]) -> None:
    colors, shade = matplotlib.colormaps["cividis"], Normalize(0, 1)  # its lightness rises evenly: it reads in grey
    axes.set_xlim(-0.5, len(lengths) - 0.5)
    axes.set_ylim(len(depths) - 0.5, -0.5)
    axes.set_xticks(range(len(lengths)), [format_tokens(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for x, length in enumerate(lengths):
        found = panel.get(length)
        counts = {} if found is None else _counts(found)
        for y, depth in enumerate(depths):
            corner = (x - 0.5, y - 0.5)
            if depth not in counts:
                axes.add_patch(Rectangle(corner, 1, 1, fill=False, hatch="///", edgecolor=GRID, linewidth=0))
                continue
            hits, documents = counts[depth]
            share = hits / documents
            axes.add_patch(Rectangle(corner, 0.96, 0.94, color=colors(shade(share)), linewidth=0))
            color = "#ffffff" if share < 0.5 else "#000000"
            axes.text(x, y, f"{hits:g}/{documents}", ha="center", va="center", fontsize=7, color=color)


def _counts(found: pd.DataFrame) -> dict[float, tuple[float, int]]:
    """Return (hits, documents) by depth."""
    pairs = zip(found["hits"].tolist(), found["documents"].tolist(), strict=True)
    return dict(zip(found["depth"].tolist(), pairs, strict=True))
