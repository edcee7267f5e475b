"""The figures: NLL against position, perplexity and scores against length, finds by depth and length; speed, memory.

Every figure can be read in grey and with any colour vision: lines differ in marker and dash as well as colour and are
labelled at their ends, heat maps print their numbers.
"""

from __future__ import annotations

from dataclasses import replace

import matplotlib
import pandas as pd

from lminf_eval.report.benches import read_bench
from lminf_eval.report.escape import plain, shorten
from lminf_eval.report.figures.figure import SETTINGS, Plot
from lminf_eval.report.figures.heatmap import heat_maps
from lminf_eval.report.figures.lines import nll_against_position, perplexity_against_length, score_against_length
from lminf_eval.report.figures.speed import bench_figures
from lminf_eval.report.figures.style import Style, assign_styles
from lminf_eval.report.identity import PROMPT_COLUMNS, RUN_COLUMNS, TASK_COLUMNS
from lminf_eval.report.pivot import label_of
from lminf_eval.report.sample_store import SampleStore

SAME_LINE = ["model_path", "method", "family"]
SAME_POINT = [*SAME_LINE, "length", "metric", "filter"]


def draw_figures(store: SampleStore) -> list[Plot]:
    """Draw all figures that the results allow: each kind for each model and family of tasks, and those of benches."""
    results, benches = store.collection.results, store.collection.benches
    if len(results):
        results = _with_lines(results.sort_values("date", kind="stable"))
    names = [*results.get("line", []), *(name for bench in benches for name in read_bench(bench)["line"])]
    line_styles = assign_styles(names)
    made = []
    with matplotlib.rc_context(SETTINGS):
        for kind in KINDS if len(results) else ():
            for (_, family), group in results.groupby(["model_path", "family"], sort=True):
                subtitle = f"{shorten(plain(group['model'].iloc[0]), 40)}, {shorten(plain(str(family)), 40)}"
                plot = kind(store, group, line_styles, subtitle)
                made += [plot] if plot else []
        for bench in benches:
            made += bench_figures(bench, line_styles)
    return [_named_apart(plot, made[:i]) for i, plot in enumerate(made)]


def _heat_maps_or_scores(
    store: SampleStore, group: pd.DataFrame, line_styles: dict[str, Style], subtitle: str
) -> Plot | None:
    """Draw the heat maps of a family whose documents tell a depth, and the scores of any other."""
    return heat_maps(store, group, line_styles, subtitle) or score_against_length(store, group, line_styles, subtitle)


KINDS = (nll_against_position, perplexity_against_length, _heat_maps_or_scores)


def _with_lines(results: pd.DataFrame) -> pd.DataFrame:
    """Add a column line: the method, and whatever else tells its measurements apart.

    Settings of a run make lines of their own; those of a task only if two results would stand at one point, since a
    sweep may have fewer documents at greater lengths.
    """
    names = results["method"].copy()
    settings = {
        name: SAME_LINE
        for name in (*RUN_COLUMNS, *PROMPT_COLUMNS)
        if name not in ("model_path", "backend", "attention")
    }
    settings |= {name: SAME_POINT for name in TASK_COLUMNS if name not in ("length", "n", "limit")}
    for name, same in settings.items():
        several = results.groupby(same, dropna=False)[name].transform("nunique", dropna=False) > 1
        shown = results[name].map(label_of(name))
        names += (" " + ("" if name == "other" else f"{name}=") + shown).where(several & (shown != ""), "")
    return results.assign(line=names)


def _named_apart(plot: Plot, before: list[Plot]) -> Plot:
    same = sum(other.name == plot.name for other in before)
    return replace(plot, name=f"{plot.name}-{same + 1}") if same else plot
