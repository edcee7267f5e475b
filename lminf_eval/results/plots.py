"""The figures: NLL against position, perplexity against length, passkey accuracy by depth and length; speed and memory.

Every figure can be read in grey and with any colour vision: lines differ in marker and dash as well as colour and are
labelled at their ends, heat maps print their numbers.
"""

from __future__ import annotations

from dataclasses import replace

import matplotlib
import pandas as pd

from lminf_eval.results.benches import read_bench
from lminf_eval.results.escape import plain, shorten
from lminf_eval.results.evidence import Evidence
from lminf_eval.results.figure import SETTINGS, Plot
from lminf_eval.results.heatmap import passkey_heat_maps
from lminf_eval.results.lines import nll_against_position, perplexity_against_length
from lminf_eval.results.speed import bench_figures
from lminf_eval.results.style import styles


def plots(evidence: Evidence) -> list[Plot]:
    """Every figure that the results allow: the kinds of this module, for each model and family of tasks; and of each
    bench."""
    results, benches = evidence.collection.results, evidence.collection.benches
    if len(results):
        results = _with_lines(results.sort_values("date", kind="stable"))
    names = [*results.get("line", []), *(name for bench in benches for name in read_bench(bench)["line"])]
    looks = styles(names)
    made = []
    with matplotlib.rc_context(SETTINGS):
        for kind in (nll_against_position, perplexity_against_length, passkey_heat_maps) if len(results) else ():
            for (_, family), group in results.groupby(["model_path", "family"], sort=True):
                about = f"{shorten(plain(group['model'].iloc[0]), 40)}, {shorten(plain(family), 40)}"
                plot = kind(evidence, group, looks, about)
                made += [plot] if plot else []
        for bench in benches:
            made += bench_figures(bench, looks)
    return [_named_apart(plot, made[:i]) for i, plot in enumerate(made)]


def _with_lines(results: pd.DataFrame) -> pd.DataFrame:
    """`results` with a column line: the method, and its other settings where a model has it with several."""
    several = results.groupby(["model_path", "method"])["other"].transform("nunique") > 1
    return results.assign(line=results["method"].where(~several, results["method"] + " " + results["other"]))


def _named_apart(plot: Plot, before: list[Plot]) -> Plot:
    same = sum(other.name == plot.name for other in before)
    return replace(plot, name=f"{plot.name}-{same + 1}") if same else plot
