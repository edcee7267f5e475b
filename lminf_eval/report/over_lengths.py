"""What a family of tasks says over all of its lengths: effective length, weighted averages, what is left of a score.

Sources: RULER (Hsieh et al. 2024, arXiv 2404.06654, section 4), whose effective length is the longest at which a model
stays above the score of Llama-2-7B at 4k, 85.6 %, and which weights averages linearly, towards long or short texts.
NoLiMa (Modarressi et al. 2025, arXiv 2502.05167, section 4) asks for 85 % of a model's own score in short texts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pandas as pd

from lminf_eval.report.identity import PROMPT_COLUMNS, RUN_COLUMNS, TASK_COLUMNS
from lminf_eval.report.pivot import Table, pivot
from lminf_eval.report.sample_store import SampleStore

RULER_THRESHOLD = 0.856
OWN_SHARE = 0.85
EFFECTIVE, EFFECTIVE_OWN, LONGEST = "effective length", "effective length by own score", "longest"
_SAME = (
    *("model", "method", "family", "metric", "filter", *RUN_COLUMNS, *PROMPT_COLUMNS),
    *(name for name in TASK_COLUMNS if name not in ("length", "task", "n", "limit", "subset")),
)


def over_lengths(results: pd.DataFrame, threshold: float = RULER_THRESHOLD) -> pd.DataFrame:
    """Return rows like those of `results`, whose metrics sum up all lengths of a family of tasks under one method.

    Only scores count, the higher the better, of families that were run at two lengths or more. Metrics:

    - `EFFECTIVE`: the longest length up to which no score is below `threshold`, or 0 if the first one is. It is given
      if all scores lie between 0 and 1;
    - `EFFECTIVE_OWN`: the longest length up to which no score is below `OWN_SHARE` of the score at the shortest length.
      It is given if that score is above 0;
    - "average to long", "average to short": weights rise, or fall, linearly from length to length;
    - "left at the longest": the score at the longest length, as a share of that at the shortest; `LONGEST` is that
      length.
    """
    scores = results[
        (results["higher_is_better"].map(lambda better: better == 1))  # it may be missing
        & results["length"].notna()
        & results["value"].map(math.isfinite)
    ]
    rows = []
    for _, group in scores.groupby(list(_SAME), dropna=False, sort=False):
        by_length = group.sort_values(["length", "date"], kind="stable").drop_duplicates("length", keep="last")
        if len(by_length) < 2:
            continue
        counts = set(by_length["n"])
        shared = {"task": by_length["family"].iloc[0], "length": math.nan, "stderr": math.nan, "past_trained": False}
        shared["n"] = counts.pop() if len(counts) == 1 else math.nan
        for metric, value in _summary(by_length["length"].tolist(), by_length["value"].tolist(), threshold):
            rows.append({**by_length.iloc[-1], **shared, "metric": metric, "logged_as": metric, "value": value})
    return pd.DataFrame(rows, columns=results.columns)


def summary_table(
    store: SampleStore, results: pd.DataFrame, rows: Sequence[str], threshold: float = RULER_THRESHOLD
) -> Table | None:
    """Return the table of `over_lengths`; None if no family has scores at two lengths."""
    summed = over_lengths(results, threshold)
    if summed.empty:
        return None
    table = pivot(store, summed, rows, ("metric",))
    table.notes.clear()  # nothing tells how certain such a value is
    return table


def _summary(lengths: list[float], values: list[float], threshold: float) -> Iterator[tuple[str, float]]:
    if all(0 <= value <= 1 for value in values):
        yield EFFECTIVE, _effective(lengths, values, threshold)
    if values[0] > 0:
        yield EFFECTIVE_OWN, _effective(lengths, values, OWN_SHARE * values[0])
    weights = range(1, len(values) + 1)
    for name, order in (("average to long", values), ("average to short", values[::-1])):
        yield name, sum(weight * value for weight, value in zip(weights, order, strict=True)) / sum(weights)
    if values[0] > 0:
        yield "left at the longest", values[-1] / values[0]
    yield LONGEST, lengths[-1]


def _effective(lengths: list[float], values: list[float], least: float) -> float:
    """Return the longest length up to which no value is below `least`; 0 if there is none."""
    longest = 0.0
    for length, value in zip(lengths, values, strict=True):
        if value < least:
            break
        longest = length
    return longest
