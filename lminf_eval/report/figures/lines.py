"""The figures of lines: NLL against position, perplexity and scores against length. Each line is named at its end."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lminf_eval.report.escape import plain
from lminf_eval.report.figures.curves import nll_by_position
from lminf_eval.report.figures.figure import Plot, short_method, slug
from lminf_eval.report.figures.style import GRID, INK, Style
from lminf_eval.report.frames import group_by_name
from lminf_eval.report.load import DIVERGED_PERPLEXITY
from lminf_eval.report.pivot import primary_metrics
from lminf_eval.report.sample_store import SampleStore
from lminf_eval.utils.tokens import format_tokens

MOST_BANDS = 6  # intervals of more lines than that hide one another
LEADER = {"arrowstyle": "-", "linewidth": 0.8, "shrinkA": 0, "shrinkB": 2, "relpos": (0, 0.5)}
LABEL_GAP = 11  # points between two labels at lines' ends

LineEnd = tuple[str, float, float]  # the line's name, and the x and y of its last point


def nll_against_position(
    store: SampleStore, group: pd.DataFrame, line_styles: dict[str, Style], subtitle: str
) -> Plot | None:
    """Draw one line a method: the mean loss of each stretch of the longest texts; the paper's headline figure."""
    curves = {}
    for method, results in group_by_name(group, "line"):
        longest_first = results.iloc[::-1].sort_values("length", ascending=False, kind="stable")
        for _, result in longest_first.drop_duplicates(["run", "task"]).iterrows():
            samples = store.samples(result["run"], result["task"])
            curve = nll_by_position(samples) if samples is not None else pd.DataFrame()
            if len(curve) > 1:
                curves[method] = curve
                break  # the longest text tells the most
    if not curves:
        return None
    documents = max(int(curve["documents"].max()) for curve in curves.values())
    banded = documents > 1 and len(curves) <= MOST_BANDS
    figure, axes = new_axes()
    ends: list[LineEnd] = []
    for method, curve in curves.items():
        style, middle = line_styles[method], (curve["start"] + curve["end"]) / 2
        draw_line(axes, middle, curve["nll"], style)
        if banded:
            axes.fill_between(middle, curve["low"], curve["high"], color=style.color, alpha=0.15, linewidth=0)
        ends.append((method, middle.iloc[-1], curve["nll"].iloc[-1]))
    reach = max(curve["end"].max() for curve in curves.values())
    axes.set_xlim(0, reach)
    axes.set_xticks(*_round_positions(reach))
    axes.set_xlabel("position in the text (tokens)")
    axes.set_ylabel("negative log-likelihood (nats per token)")
    title = f"Loss against position: {subtitle}"
    axes.set_title(title, pad=12)
    _trained_line(axes, group)
    label_ends(axes, ends, line_styles)
    caption = (
        f"Mean negative log-likelihood of the tokens at each position, over {documents} "
        f"document{'s' if documents > 1 else ''}; lower is better. Points are at the middle of their stretch of text. "
        + ("Bands: 95% bootstrap intervals over documents." if banded else "")
    )
    return Plot(slug("nll", subtitle), title, caption.strip(), figure)


def perplexity_against_length(
    store: SampleStore, group: pd.DataFrame, line_styles: dict[str, Style], subtitle: str
) -> Plot | None:
    """Draw one line a method; values that diverged are marked above the axes, so that they do not ruin the scale."""
    of_metric = group[(group["metric"] == "token_perplexity") & group["length"].notna()]
    if of_metric["length"].nunique() < 2:
        return None
    figure, axes = new_axes()
    ends: list[LineEnd] = []
    diverged = 0  # methods that diverged at some length
    for method, results in group_by_name(of_metric, "line"):
        results = results.sort_values("length", kind="stable").drop_duplicates("length", keep="last")
        fine = results["diverged"] == ""
        style = line_styles[method]
        draw_line(axes, results["length"], results["value"].where(fine), style)
        if fine.any():
            last = results[fine].iloc[-1]
            ends.append((method, last["length"], last["value"]))
        if not fine.all():
            _mark_diverged(axes, method, results.loc[~fine, "length"], style, diverged)
            diverged += 1
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    if diverged:
        axes.set_ylim(top=min(axes.get_ylim()[1] * 1.5, DIVERGED_PERPLEXITY))
    lengths = sorted(of_metric["length"].unique())
    axes.set_xticks(lengths, [format_tokens(length) for length in lengths])
    axes.minorticks_off()
    axes.set_yticks(*round_values(*axes.get_ylim()))
    axes.set_xlabel("length of the text (tokens)")
    axes.set_ylabel("perplexity per token")
    title = f"Perplexity against length: {subtitle}"
    axes.set_title(title, pad=12 + 14 * diverged)
    _trained_line(axes, group)
    label_ends(axes, ends, line_styles)
    caption = "Perplexity per token of whole texts of each length; lower is better; both axes are logarithmic."
    if diverged:
        caption += " Hollow marks above the axes: no number, or a perplexity over 1000."
    return Plot(slug("perplexity", subtitle), title, caption, figure)


def _mark_diverged(axes: Axes, method: str, lengths: pd.Series, style: Style, earlier: int) -> None:
    """Mark the lengths at which a method diverged above the axes, and above the marks of `earlier` methods."""
    height = 1.02 + 0.04 * earlier
    hollow: dict[str, Any] = {"marker": style.marker, "linestyle": "", "markerfacecolor": "none"}
    at = axes.get_xaxis_transform()
    axes.plot(lengths, [height] * len(lengths), transform=at, color=style.color, clip_on=False, **hollow)
    axes.annotate(
        f"{short_method(method)} diverged",
        (1, height),
        xycoords="axes fraction",
        xytext=(10, 0),
        textcoords="offset points",
        va="center",
        fontsize=8.5,
    )


def score_against_length(
    store: SampleStore, group: pd.DataFrame, line_styles: dict[str, Style], subtitle: str
) -> Plot | None:
    """Draw one line a method: the family's first score, of which higher is better, at each length, 0 included."""
    scores = group[(group["higher_is_better"] == True) & group["length"].notna()]  # noqa: E712  (it may be None)
    scores = scores[scores["metric"] == primary_metrics(group).get(group["family"].iloc[0])]
    if scores["length"].nunique() < 2:
        return None
    figure, axes = new_axes()
    ends: list[LineEnd] = []
    for method, results in group_by_name(scores, "line"):
        results = results.sort_values("length", kind="stable").drop_duplicates("length", keep="last")
        draw_line(axes, results["length"], results["value"], line_styles[method])
        ends.append((method, results["length"].iloc[-1], results["value"].iloc[-1]))
    lengths = sorted(scores["length"].unique())
    axes.set_xscale("symlog", base=2, linthresh=lengths[0] or lengths[1])  # logarithmic, with a place for 0
    axes.set_xticks(lengths, [format_tokens(length) for length in lengths])
    axes.minorticks_off()
    if scores["value"].between(0, 1).all():
        axes.set_ylim(-0.03, 1.03)
    metric = scores["metric"].iloc[0]
    axes.set_xlabel("length of the text (tokens)")
    axes.set_ylabel(plain(metric))
    title = f"Score against length: {subtitle}"
    axes.set_title(title, pad=12)
    _trained_line(axes, group)
    label_ends(axes, ends, line_styles)
    caption = (
        f"Mean {plain(metric)} over the documents of each length; higher is better; lengths are on a logarithmic axis."
    )
    return Plot(slug("score", subtitle), title, caption, figure)


def new_axes() -> tuple[Figure, Axes]:
    """Return an empty figure with the size and the grid of all line figures."""
    figure = Figure(figsize=(6.4, 3.6))
    axes = figure.subplots()
    axes.grid(axis="y", color=GRID, alpha=0.3, linewidth=0.7)
    return figure, axes


def draw_line(axes: Axes, x: pd.Series, y: pd.Series, style: Style) -> None:
    """Draw one method's line, with a marker at a dozen of its points at most."""
    every = max(1, len(x) // 12)
    axes.plot(x, y, color=style.color, marker=style.marker, linestyle=style.line, markevery=every)


def _round_positions(reach: float) -> tuple[list[int], list[str]]:
    step = 2 ** max(0, math.ceil(math.log2(reach / 8)))
    ticks = list(range(0, int(reach) + 1, step))
    return ticks, [format_tokens(tick) for tick in ticks]


def round_values(low: float, high: float) -> tuple[list[float], list[str]]:
    """Return ticks and labels for a logarithmic axis, whether it spans little or much."""
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
        f"trained at {format_tokens(trained)}",
        (trained, 0.99),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        va="top",
        fontsize=8,
    )


def label_ends(axes: Axes, ends: list[LineEnd], line_styles: dict[str, Style]) -> None:
    """Label each line at its end (name, x, y); move labels up or down as far as needed to keep them apart."""
    ends = [end for end in ends if math.isfinite(end[2])]
    scale = 72 / axes.figure.dpi
    heights = [axes.transData.transform(end[1:])[1] * scale for end in ends]  # points from the figure's foot
    edge = axes.get_window_extent().x1 * scale
    for at, wanted in zip(np.argsort(heights), _spread(sorted(heights)), strict=True):
        method, x, y = ends[at]
        here = axes.transData.transform((x, y))[0] * scale
        axes.annotate(
            short_method(method),
            (x, y),
            xytext=(edge - here + 10, wanted - heights[at]),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            annotation_clip=False,
            arrowprops=LEADER | {"color": line_styles[method].color},
        )


def _spread(heights: list[float]) -> list[float]:
    """Return the ascending `heights`, moved as little as possible so that neighbours are `LABEL_GAP` apart."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _lowest(groups[-1]) < _lowest(groups[-2]) + LABEL_GAP * len(groups[-2]):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_lowest(group) + i * LABEL_GAP for group in groups for i in range(len(group))]


def _lowest(group: list[float]) -> float:
    return sum(group) / len(group) - LABEL_GAP * (len(group) - 1) / 2
