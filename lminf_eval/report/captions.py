"""Comparisons as text, the same in every format."""

from __future__ import annotations

import math

from lminf_eval.report.paired_bootstrap import FEWEST_DIFFERING, Comparison
from lminf_eval.utils.formatting import format_metric


def format_comparison(comparison: Comparison) -> str:
    """Return a difference with its interval and evidence, such as "+0.400 [0.250, 0.550], paired bootstrap on …"."""
    text = ("+" if comparison.estimate > 0 else "") + format_metric(comparison.estimate)
    if math.isnan(comparison.low):
        return f"{text} (no interval: {'one document' if comparison.documents == 1 else 'no documents or errors'})"
    text += f" [{format_metric(comparison.low)}, {format_metric(comparison.high)}], {comparison.how}"
    if comparison.documents:
        text += f" on {comparison.documents} documents"
    if comparison.unmatched:
        text += f", {comparison.unmatched} that only one has left out"
    if not comparison.significant:
        few = comparison.documents and comparison.differing < FEWEST_DIFFERING
        text += f"; not significant{f' (documents that differ: {comparison.differing})' if few else ''}"
    return text
