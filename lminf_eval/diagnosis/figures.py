"""The figures: a panel for each layer; logits against distance, entropy against position, hidden states on two axes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lminf_eval.diagnosis.tables import Tables
from lminf_eval.report.figures.figure import SETTINGS, Plot
from lminf_eval.report.figures.style import GRID, INK, VERMILION, Style, own_style
from lminf_eval.report.frames import group_by_name, group_by_number
from lminf_eval.utils.tokens import format_tokens

_FULL, _OURS = own_style("full"), own_style("lambda")
_GROUPS = 24  # of neighbouring queries whose entropies are averaged for the line

Row = Callable[[Tables, Sequence[Axes], int, int], list[Line2D]]


def draw_figures(tables: Tables, model: str, n_local: int, n_global: int) -> list[Plot]:
    """Draw one figure for each of the three factors, and one with all of them."""
    rows = {
        "logits": (logits_row, f"Attention logits against distance: {model}", _LOGITS),
        "entropy": (entropy_row, f"Attention entropy against position: {model}", _ENTROPY),
        "hidden-states": (states_row, f"Hidden states: {model}", _STATES),
    }
    with matplotlib.rc_context(SETTINGS):
        single = [
            Plot(name, title, caption, _figure([row], title, tables, n_local, n_global))
            for name, (row, title, caption) in rows.items()
        ]
        title = f"Within and beyond n_local = {n_local:,}: {model}"
        whole = _figure([row for row, _, _ in rows.values()], title, tables, n_local, n_global)
    return [*single, Plot("diagnosis", title, " ".join([_LOGITS, _ENTROPY, _STATES]), whole)]


_LOGITS = (
    "Attention logits by the distance at which a query sees a key, over all heads: the highest and the mean of each "
    "bin; bins widen with distance. Λ-attention sees its starting tokens as if at n_local."
)
_ENTROPY = (
    "Entropy of the attention, the mean over heads: points are single queries, lines their local means; the grey line "
    "is the logarithm of the position, the entropy of attending evenly to all that came before."
)
_STATES = (
    "What the layer's block puts out, on the two principal axes of positions below n_local; the axes are linear in the "
    "middle (three standard deviations) and logarithmic outside."
)


def logits_row(tables: Tables, row: Sequence[Axes], n_local: int, n_global: int) -> list[Line2D]:
    """Draw the highest and the mean logit of each bin of distance."""
    far = tables.logits[tables.logits["distance_from"] > 0]  # the distance 0 has no place on a logarithmic axis
    for axes, (_, of_layer) in zip(row, far.groupby("layer"), strict=True):
        for method, logits in group_by_name(of_layer, "method"):
            _draw_logits(axes, method, logits, n_local)
        reach = far["distance_to"].max() + 1
        axes.set_xscale("log", base=2)
        axes.set_xticks(*_labelled(2**power for power in range(0, int(np.log2(reach)) + 1, 4)))
        _tokens_axis(axes, n_local, "distance (tokens)")
    row[0].set_ylabel("logit")
    held = Line2D(
        [], [], linestyle="", marker="o", color=_OURS.color, markerfacecolor="none", label="lambda, first tokens"
    )
    thin = Line2D([], [], color=INK, linewidth=1, alpha=0.6, label="thin lines: mean")
    return [*_method_handles(": highest"), held, thin, _boundary(n_local)]


def _draw_logits(axes: Axes, method: str, logits: pd.DataFrame, n_local: int) -> None:
    """Draw one method's lines: a thick one of the highest logit of each bin, a thin one of the mean."""
    style = own_style(method)
    bins = logits.assign(total=logits["mean"] * logits["pairs"]).groupby("distance_from")
    curve = pd.DataFrame(
        {
            "middle": (bins["distance_from"].first() * bins["distance_to"].first()) ** 0.5,
            "highest": bins["max"].max(),
            "mean": bins["total"].sum() / bins["pairs"].sum(),
        }
    )
    if method == "lambda":  # the starting tokens, all as if at one distance, belong to no line
        values = [curve[name].get(n_local, np.nan) for name in ("highest", "mean")]
        hollow: dict[str, Any] = {"linestyle": "", "marker": style.marker, "markerfacecolor": "none"}
        axes.plot([n_local, n_local], values, color=style.color, **hollow)
        curve = curve[curve.index < n_local]
    drawn: dict[str, Any] = {"color": style.color, "linestyle": style.line}
    axes.plot(curve["middle"], curve["highest"], marker=style.marker, markevery=4, **drawn)
    axes.plot(curve["middle"], curve["mean"], linewidth=1, alpha=0.6, **drawn)


def entropy_row(tables: Tables, row: Sequence[Axes], n_local: int, n_global: int) -> list[Line2D]:
    """Draw the entropy of each query's attention, and its bound."""
    for axes, (_, of_layer) in zip(row, tables.entropy.groupby("layer"), strict=True):
        position = np.sort(of_layer["position"].unique()) + 1
        axes.plot(position, np.log(position), color=GRID, linewidth=1)
        for method, queries in group_by_name(of_layer, "method"):
            style = own_style(method)
            at = queries["position"] + 1
            axes.plot(at, queries["entropy"], ".", color=style.color, markersize=3, alpha=0.4)
            groups = queries.assign(at=at).groupby(pd.cut(at, _GROUPS), observed=True)
            axes.plot(groups["at"].mean(), groups["entropy"].mean(), color=style.color, linestyle=style.line)
        step = 2 ** round(np.log2(position[-1] / 4))
        axes.set_xticks(*_labelled(range(0, position[-1] + 1, step)))
        _tokens_axis(axes, n_local, "position (tokens)")
    row[0].set_ylabel("entropy (nats)")
    bound = Line2D([], [], color=GRID, linewidth=1, label="log(position)")
    return [*_method_handles(marked=False), bound, _boundary(n_local)]


def states_row(tables: Tables, row: Sequence[Axes], n_local: int, n_global: int) -> list[Line2D]:
    """Draw hidden states on two axes: the starting tokens, the trained range, and beyond it under each method."""
    small: dict[str, Any] = {"linestyle": "", "markersize": 2.5}
    groups: list[tuple[pd.DataFrame, dict[str, Any]]] = []
    for axes, (layer, states) in zip(row, group_by_number(tables.states, "layer"), strict=True):
        of_full, beyond = states["method"] == "full", states["position"] >= n_local
        first = of_full & (states["position"] < n_global)
        usual = of_full & ~beyond & ~first
        groups = [
            (states[usual], {"color": GRID, "marker": "o", "alpha": 0.3, **small}),
            (states[of_full & beyond], {"color": _FULL.color, "marker": _FULL.marker, "alpha": 0.5, **small}),
            (states[~of_full & beyond], {"color": _OURS.color, "marker": _OURS.marker, "alpha": 0.4, **small}),
            (states[first], {"color": VERMILION, "marker": "*", "linestyle": "", "markersize": 7}),
        ]
        for group, style in groups:
            axes.plot(group["pc1"], group["pc2"], markeredgewidth=0, **style)
        axes.set_xscale("symlog", linthresh=3 * states[usual]["pc1"].std())
        axes.set_yscale("symlog", linthresh=3 * states[usual]["pc2"].std())
        axes.set_xticks([0], [""])
        axes.set_yticks([0], [""])
        axes.minorticks_off()
        axes.set_xlabel(f"axis 1 ({tables.explained_variance[layer][0]:.0%} of variance)")
        axes.set_ylabel(f"axis 2 ({tables.explained_variance[layer][1]:.0%})")
    labels = ["within n_local", "full, beyond", "lambda, beyond", f"first {n_global} tokens"]
    return [
        Line2D([], [], **(style | {"alpha": 1, "markersize": 7 if i == 3 else 5}), label=label)
        for i, (label, (_, style)) in enumerate(zip(labels, groups, strict=True))
    ]


def _figure(rows: list[Row], title: str, tables: Tables, n_local: int, n_global: int) -> Figure:
    layers = sorted(tables.explained_variance)
    figure = Figure(figsize=(1.6 + 2.5 * len(layers), 0.7 + 2.6 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(layers), squeeze=False)
    for draw, row in zip(rows, grid, strict=True):
        handles = draw(tables, row, n_local, n_global)
        row[-1].legend(handles=handles, loc="center left", bbox_to_anchor=(1.03, 0.5), frameon=False, fontsize=8.5)
    for axes, layer in zip(grid[0], layers, strict=True):
        axes.set_title(f"layer {layer}", fontsize=9.5)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    return figure


def _method_handles(what: str = "", marked: bool = True) -> list[Line2D]:
    styles: dict[str, Style] = {"full": _FULL, "lambda": _OURS}
    return [
        Line2D(
            [], [], color=style.color, linestyle=style.line, marker=style.marker if marked else "", label=method + what
        )
        for method, style in styles.items()
    ]


def _boundary(n_local: int) -> Line2D:
    return Line2D([], [], color=INK, linewidth=1, linestyle=(0, (2, 2)), label=f"n_local = {format_tokens(n_local)}")


def _labelled(ticks: Iterable[int]) -> tuple[list[int], list[str]]:
    ticks = list(ticks)
    return ticks, [format_tokens(tick) if tick else "0" for tick in ticks]


def _tokens_axis(axes: Axes, n_local: int, label: str) -> None:
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.grid(axis="y", color=GRID, alpha=0.3, linewidth=0.7)
    axes.axvline(n_local, color=INK, linewidth=1, linestyle=(0, (2, 2)))
