"""Read a results file of `lminf bench` as a table."""

from __future__ import annotations

from typing import Any

import pandas as pd

METHODS = {"plain": "full", "hf": "hf"}  # what a bench's sides are called in other figures


def read_bench(raw: dict[str, Any]) -> pd.DataFrame:
    """Return a row for each side of each record in the figures: case, part, line, length, median, low and high.

    `line` is the side, with its n_local if it has one; values are a token's seconds, or bytes.

    Raises:
        ValueError: if `raw` is not laid out as `lminf bench` writes it.
    """
    rows = []
    try:
        for record in raw["records"]:
            setting, tokens = record["setting"], record["tokens"]
            length = setting.get("length", setting.get("context"))
            if length is None or setting.get("batch", 1) != 1:
                continue
            for side, values in record["summary"]["sides"].items():
                name = METHODS.get(side, f"{side} n_local={setting['n_local']}")
                spread = [float(values[of]) / tokens for of in ("median", "low", "high")]
                rows.append((record["case"], setting.get("part", ""), name, int(length), *spread))
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"a bench that is not laid out as one: {type(error).__name__} {error}") from None
    return pd.DataFrame(rows, columns=["case", "part", "line", "length", "median", "low", "high"])
