"""Which results are the same measurement, so that a newer one replaces an older one.

Everything that changes an answer tells two results apart. How and when a run was done (device, batch size, parallelism,
releases) does not.
"""

from __future__ import annotations

import pandas as pd

from lminf_eval.report.run_metadata import method_settings

RUN_COLUMNS = ("model_path", "backend", "attention", *method_settings(), "other", "dtype", "weights")
TASK_COLUMNS = ("length", "task", "n_shot", "task_settings", "task_version", "n", "limit", "subset")
PROMPT_COLUMNS = ("prompt", "generation", "seeds")
IDENTITY = (*RUN_COLUMNS, *TASK_COLUMNS, *PROMPT_COLUMNS, "metric", "filter")


def newest(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Return `rows` without the older of those that measure the same, and a note for each file that lost some."""
    rows = rows.sort_values("date", kind="stable")
    replaced = _keys(rows).duplicated(keep="last")
    notes = [
        f"{count} result{'s' if count > 1 else ''} of {file} replaced by newer ones of the same measurement"
        for file, count in rows.loc[replaced, "file"].value_counts(sort=False).items()
    ]
    kept = rows[~replaced].sort_values(["model", "backend", "method", "family", "length", "metric"], kind="stable")
    return kept.reset_index(drop=True), notes


def _keys(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the columns that identify a measurement.

    `limit` counts only if the number of documents is unknown. A run without a network does not know the commit of its
    weights: it is taken for the only one that the others know.
    """
    keys = rows[list(IDENTITY)].copy()
    keys["limit"] = keys["limit"].where(keys["n"].isna(), "")
    known = keys.assign(weights=keys["weights"].where(keys["weights"] != ""))
    same = known.groupby([name for name in IDENTITY if name != "weights"], dropna=False)["weights"]
    only = same.transform("first").where(same.transform("nunique") == 1, "")
    keys["weights"] = keys["weights"].where(keys["weights"] != "", only)
    return keys
