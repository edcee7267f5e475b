"""The tidy table of all results as CSV and parquet."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from lminf_eval.errors import UsageError
from lminf_eval.results import escape

SUFFIXES = (".csv", ".parquet")


def tidy_csv(results: pd.DataFrame) -> str:
    """CSV with every digit and NaN and inf by their names; no text in it is a spreadsheet formula."""
    return _texts(results, escape.spreadsheet).to_csv(index=False, na_rep="NaN", lineterminator="\n")


def check(file: Path) -> None:
    """Raises a UsageError for a name whose ending tells no format."""
    if file.suffix not in SUFFIXES:
        raise UsageError(f"{file}: the results are exported to a name that ends in {' or '.join(SUFFIXES)}")


def write(results: pd.DataFrame, file: Path) -> None:
    """Write `results` to a .csv or .parquet file."""
    if file.suffix == ".csv":
        file.write_text(tidy_csv(results), encoding="utf-8")
    else:
        _texts(results, escape.plain).to_parquet(file, index=False)


def _texts(results: pd.DataFrame, clean) -> pd.DataFrame:
    texts = results.select_dtypes(exclude=["number", "bool", "boolean"]).columns
    return results.assign(**{name: results[name].map(lambda text: clean(str(text))) for name in texts})
