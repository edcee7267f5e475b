"""Access to pandas tables with the types that the data has, which pandas' own annotations leave open."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd


def group_by_name(table: pd.DataFrame, column: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield each value of a column of text, ascending, with its rows."""
    for name, rows in table.groupby(column):
        yield str(name), rows


def group_by_number(table: pd.DataFrame, column: str) -> Iterator[tuple[int, pd.DataFrame]]:
    """Yield each value of a column of whole numbers, ascending, with its rows."""
    for number in sorted(set(table[column].tolist())):
        yield int(number), table[table[column] == number]
