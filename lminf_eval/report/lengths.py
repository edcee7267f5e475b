"""Tasks that report each length as a metric of its own, as RULER does: "4096" is the score at 4096 tokens.

Each of their documents has one length, and -1 as its value at the others; a length without documents has -1 too.
"""

from __future__ import annotations

import math
import re
from typing import Any

import pandas as pd

from lminf_eval.report.results_file import Run
from lminf_eval.report.run_metadata import number, table
from lminf_eval.report.samples import SamplesError, metric_totals
from lminf_eval.report.tasks import documents, members

METRIC = re.compile(r"[1-9]\d{0,11}")
SCORE = "score"  # what such a metric is called here, with its name as the length
ABSENT = -1.0


def is_length(metric: str) -> bool:
    """Return True if the name of a metric is a number of tokens."""
    return METRIC.fullmatch(metric) is not None


def was_run(raw: dict[str, Any], task: str, key: str) -> bool:
    """Return True if the task, or each task of a group, had documents of the length that `key` names."""
    results = table(raw.get("results"))
    values = [table(results.get(name)).get(key) for name in {task, *members(raw, task)}]
    return ABSENT not in [number(value) for value in values]


def documents_at_length(samples: pd.DataFrame, metric: str, filter_name: str) -> pd.DataFrame:
    """Return `samples.metric_totals` of one metric; of a length, over the documents that have it."""
    totals = metric_totals(samples, metric, filter_name)
    return totals[totals["total"] != ABSENT] if is_length(metric) else totals


def count_documents(run: Run, task: str, key: str) -> float:
    """Return how many documents a task, or a group's tasks together, had at the length that `key` names.

    If a task was run at several lengths, only its samples tell; NaN without them, or if they lack documents.
    """
    return sum(_count(run, name, key) for name in members(run.raw, task))


def _count(run: Run, task: str, key: str) -> float:
    results = table(table(run.raw.get("results")).get(task))
    whole = documents(run.raw, task, results)
    metric, _, filter_name = key.partition(",")
    ran = [
        name.partition(",")[0]
        for name in results
        if is_length(name.partition(",")[0]) and name.partition(",")[2] == filter_name and was_run(run.raw, task, name)
    ]
    if ran == [metric]:
        return whole
    try:
        samples = run.read(task)
    except SamplesError:  # it is listed when its documents are asked for
        return math.nan
    if samples is None:
        return math.nan
    counts = {name: float(len(documents_at_length(samples, name, filter_name or "none"))) for name in ran}
    return counts.get(metric, math.nan) if sum(counts.values()) == whole else math.nan
