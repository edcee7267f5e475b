"""The tidy table of all results as CSV and parquet."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from lminf_eval.errors import UsageError
from lminf_eval.report import escape


def tidy_csv(results: pd.DataFrame) -> str:
    """Return CSV with every digit, NaN and inf by name, and no text that a spreadsheet takes for a formula."""
    return _texts(results, escape.spreadsheet).to_csv(index=False, na_rep="NaN", lineterminator="\n")


def tidy_parquet(results: pd.DataFrame) -> bytes:
    """Return the same as parquet."""
    out = io.BytesIO()
    _texts(results, escape.plain).to_parquet(out, index=False)
    return out.getvalue()


WRITERS: dict[str, Callable[[pd.DataFrame], str | bytes]] = {".csv": tidy_csv, ".parquet": tidy_parquet}


def check(file: Path) -> None:
    """Raises a UsageError for a name whose ending tells no format."""
    if file.suffix not in WRITERS:
        raise UsageError(f"{file}: the results are exported to a name that ends in {' or '.join(WRITERS)}")


def write(results: pd.DataFrame, file: Path) -> None:
    """Write `results` to a .csv or .parquet file."""
    content = WRITERS[file.suffix](results)
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))


def _texts(results: pd.DataFrame, clean: Callable[[str], str]) -> pd.DataFrame:
    texts = results.select_dtypes(exclude=["number", "bool", "boolean"]).columns
    return results.assign(**{name: results[name].map(lambda text: clean(str(text))) for name in texts})
