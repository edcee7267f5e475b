"""The figures of a bench (`lminf bench`): time and memory against length. Each line is named at its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from lminf_eval.report.benches import read_bench
from lminf_eval.report.escape import plain, shorten
from lminf_eval.report.figures.figure import Plot, slug
from lminf_eval.report.figures.lines import LineEnd, draw_line, label_ends, new_axes, round_values
from lminf_eval.report.figures.style import Style
from lminf_eval.report.frames import group_by_name
from lminf_eval.utils.tokens import format_tokens


@dataclass(frozen=True)
class Kind:
    """One figure: the records it shows, its texts, and `scale`, from seconds or bytes to the unit of its axis."""

    case: str
    part: str
    name: str
    title: str
    across: str
    y: str
    caption: str
    scale: float


KINDS = (
    Kind(
        "prefill",
        "",
        "scoring-time",
        "Time to score a token",
        "length of the text (tokens)",
        "milliseconds a token",
        "A text of each length as one request, all of its tokens scored; hf is lm-eval's own --model hf.",
        1e3,
    ),
    Kind(
        "decode",
        "",
        "decoding-time",
        "Time to decode a token",
        "tokens before it",
        "milliseconds a token",
        "One sequence, decoded token by token; full is the plain model with transformers' own cache.",
        1e3,
    ),
    Kind(
        "memory",
        "peak",
        "peak-memory",
        "Peak memory beyond the weights",
        "length of the text (tokens)",
        "megabytes",
        "A text of each length as one request, each in a process of its own; hf is lm-eval's own --model hf.",
        1e-6,
    ),
    Kind(
        "memory",
        "keys and values",
        "key-value-memory",
        "Memory of keys and values",
        "length of the text (tokens)",
        "megabytes",
        "Counted in the cache of one sequence; full is the plain model with transformers' own cache.",
        1e-6,
    ),
)


def bench_figures(raw: dict[str, Any], line_styles: dict[str, Style]) -> list[Plot]:
    """Draw a figure of each kind that was measured at two lengths or more."""
    measured = read_bench(raw)
    model = raw.get("model")
    subtitle = shorten(plain(model.get("name", "") if isinstance(model, dict) else ""), 40)
    return [plot for kind in KINDS if (plot := _figure(kind, measured, line_styles, subtitle))]


def _figure(kind: Kind, measured: pd.DataFrame, line_styles: dict[str, Style], subtitle: str) -> Plot | None:
    of_kind = measured[(measured["case"] == kind.case) & (measured["part"] == kind.part) & (measured["length"] > 0)]
    if of_kind["length"].nunique() < 2:
        return None
    figure, axes = new_axes()
    ends: list[LineEnd] = []
    for name, values in group_by_name(of_kind, "line"):
        # hf is measured with each n_local; the median of its medians stands for it.
        values = kind.scale * values.groupby("length")[["median", "low", "high"]].median()
        style = line_styles[name]
        draw_line(axes, values.index.to_series(), values["median"], style)
        axes.fill_between(values.index, values["low"], values["high"], color=style.color, alpha=0.15, linewidth=0)
        ends.append((name, values.index[-1], values["median"].iloc[-1]))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = sorted(of_kind["length"].unique())
    axes.set_xticks(lengths, [format_tokens(length) for length in lengths])
    axes.minorticks_off()
    axes.set_yticks(*round_values(*axes.get_ylim()))
    axes.set_xlabel(kind.across)
    axes.set_ylabel(kind.y)
    title = f"{kind.title}: {subtitle}"
    axes.set_title(title, pad=12)
    label_ends(axes, ends, line_styles)
    caption = f"{kind.caption} Medians, from the lowest to the highest run; lower is better; both axes are logarithmic."
    return Plot(slug(kind.name, subtitle), title, caption, figure)
