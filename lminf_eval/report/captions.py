"""Numbers and comparisons in words, the same in every format."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lminf_eval.report.paired_bootstrap import FEWEST_DIFFERING, Comparison
from lminf_eval.utils.formatting import format_metric

if TYPE_CHECKING:
    from lminf_eval.report.pivot import Table


def format_comparison(comparison: Comparison) -> str:
    """A difference with its interval and its evidence, such as "+0.400 [0.250, 0.550], 20 documents, …"."""
    told = ("+" if comparison.estimate > 0 else "") + format_metric(comparison.estimate)
    if math.isnan(comparison.low):
        return f"{told} (no interval: {'one document' if comparison.documents == 1 else 'no documents or errors'})"
    told += f" [{format_metric(comparison.low)}, {format_metric(comparison.high)}], {comparison.how}"
    if comparison.documents:
        told += f" on {comparison.documents} documents"
    if comparison.unmatched:
        told += f", {comparison.unmatched} that only one has left out"
    if not comparison.significant:
        few = comparison.documents and comparison.differing < FEWEST_DIFFERING
        told += f"; not significant{f' (documents that differ: {comparison.differing})' if few else ''}"
    return told


def legend(table: Table) -> list[str]:
    """What the table's signs mean, only those that it uses."""
    cells = list(table.cells.values())
    told = []
    errors = [cell.stderr for cell in cells if not math.isnan(cell.stderr) and not cell.result["diverged"]]
    told.append("n: documents; ±: standard error over them." if errors else "n: documents.")
    if 0 in errors:
        told.append("±0: every document scored the same; with few documents that is no certainty.")
    if any(cell.mark for cell in cells):
        told.append(
            "Bold: the best, of a model's methods or else of the models; underlined: the runner-up. Both only where "
            "the 95% interval of their difference leaves out zero and at least "
            f"{FEWEST_DIFFERING} documents differ; not corrected for many comparisons."
        )
    if any(cell.result["past_trained"] for cell in cells):
        told.append("†: longer than the model was trained at.")
    if any(cell.result["diverged"] for cell in cells):
        told.append("NaN, inf, >1000: the model diverged (no number, an infinite one, or a perplexity over 1000).")
    if table.baseline:
        told.append(
            f"In parentheses: the difference to {table.baseline}, or for perplexities (×) the ratio over it, with its "
            "95% interval, from a paired bootstrap over documents, or without documents from the standard errors."
        )
    return told
