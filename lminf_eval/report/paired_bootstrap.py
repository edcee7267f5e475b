"""How sure a number is, and whether one method is better than another on the same documents.

Every metric handled here is a smooth function g of a ratio of sums over documents, g(Σ total / Σ weight): a mean
(weight 1), a perplexity exp(-Σ log-likelihood / Σ tokens), bits per byte, and so on. The metric's name does not decide
which g it is: `find_metric_form` takes the one that reproduces, from the documents, the value that lm-eval reported.

Intervals are percentile bootstrap intervals over documents (Efron and Tibshirani, An Introduction to the Bootstrap,
1993, section 13.3). Two methods are compared by drawing the *same* documents for both (a paired bootstrap; Koehn,
Statistical Significance Tests for Machine Translation Evaluation, EMNLP 2004), so that a document's difficulty, which
both share, cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd

LEVEL = 0.95
NORMAL_QUANTILE = 1.959964  # of a standard normal, two-sided at LEVEL
# Five documents that all favour one side have a probability of 2 / 2**5 > 5% under no difference at all: an exact sign
# test cannot reach 5% with fewer than six documents that differ, so nothing is called significant on fewer.
FEWEST_DIFFERING = 6

METRIC_FORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda ratio: ratio,
    "exp(-mean)": lambda ratio: np.exp(-ratio),
    "exp(mean)": np.exp,
    "-mean": lambda ratio: -ratio,
    "-mean/ln 2": lambda ratio: -ratio / np.log(2),
    "mean/ln 2": lambda ratio: ratio / np.log(2),
}


@dataclass(frozen=True)
class Comparison:
    """One method against another: `estimate` is a - b, or a / b, with its interval, on the documents both have.

    `documents` counts the documents both have, `differing` those of them on which the two differ, `unmatched` those
    that only one has. `how` names the evidence: "paired bootstrap", "standard errors" (independent samples, no
    documents at hand) or "none".
    """

    estimate: float
    low: float
    high: float
    how: str
    documents: int = 0
    differing: int = 0
    unmatched: int = 0
    significant: bool = False


def evaluate(documents: pd.DataFrame, form: str) -> float:
    """Return the metric over `documents` (columns total and weight, one row a document)."""
    total, weight = documents[["total", "weight"]].to_numpy(float).sum(axis=0)  # unlike pandas', this sum keeps NaN
    with np.errstate(all="ignore"):
        return float(METRIC_FORMS[form](total / weight))


def find_metric_form(measured: Iterable[tuple[pd.DataFrame, float]]) -> str | None:
    """Return the first of `METRIC_FORMS` that fits every (documents, reported value) pair; None if none does.

    Values that are not finite are skipped, since they fit any form.
    """
    finite = [(documents, value) for documents, value in measured if np.isfinite(value) and len(documents)]
    if not finite:
        return None
    fits = (form for form in METRIC_FORMS if all(reproduces(documents, form, value) for documents, value in finite))
    return next(fits, None)


def reproduces(documents: pd.DataFrame, form: str, value: float) -> bool:
    """Return True if the metric over `documents` is the reported `value`, to the digits that samples have."""
    return bool(np.isclose(evaluate(documents, form), value, rtol=1e-6, atol=1e-12, equal_nan=True))


def bootstrap_interval(documents: pd.DataFrame, form: str, higher_is_better: bool) -> tuple[float, float, float]:
    """Return (standard error, low, high) of the metric; all NaN if there are fewer than two documents."""
    if len(documents) < 2:
        return np.nan, np.nan, np.nan
    drawn = _replicates(documents, form, higher_is_better)
    low, high = _percentiles(drawn)
    with np.errstate(invalid="ignore"):
        return float(np.std(drawn, ddof=1)), low, high


def compare(a: pd.DataFrame, b: pd.DataFrame, form: str, higher_is_better: bool, ratio: bool = False) -> Comparison:
    """Compare `a` with `b` by a paired bootstrap over the documents that are in both.

    A value that is not finite counts as the worst possible: a method whose perplexity is NaN has lost. The difference
    is significant if its interval excludes "no difference" and at least `FEWEST_DIFFERING` documents differ.
    """
    common = a.index.intersection(b.index)
    unmatched = len(a) + len(b) - 2 * len(common)
    if not len(common):
        return Comparison(np.nan, np.nan, np.nan, "none", unmatched=unmatched)
    a, b = a.loc[common], b.loc[common]
    contrast, nothing = (_ratio, 1.0) if ratio else (_difference, 0.0)
    estimate = float(contrast(_point(a, form, higher_is_better), _point(b, form, higher_is_better)))
    differing = int((a[["total", "weight"]].to_numpy() != b[["total", "weight"]].to_numpy()).any(axis=1).sum())
    if len(common) < 2:
        return Comparison(estimate, np.nan, np.nan, "none", 1, differing, unmatched)
    drawn = contrast(_replicates(a, form, higher_is_better), _replicates(b, form, higher_is_better))
    low, high = _percentiles(drawn)
    significant = differing >= FEWEST_DIFFERING and (low > nothing or high < nothing)
    return Comparison(estimate, low, high, "paired bootstrap", len(common), differing, unmatched, significant)


def compare_by_errors(a: tuple[float, float, float], b: tuple[float, float, float], ratio: bool = False) -> Comparison:
    """Compare a with b from (value, standard error, documents) alone, as independent samples.

    What is left when the documents are not at hand; wider than the paired interval, since nothing cancels. The
    difference is taken as normal, of a ratio its logarithm (the delta method).
    """
    (value_a, error_a, n_a), (value_b, error_b, n_b) = a, b
    contrast, nothing = (_ratio, 1.0) if ratio else (_difference, 0.0)
    estimate = float(contrast(np.array(value_a), np.array(value_b)))
    if ratio:
        with np.errstate(all="ignore"):
            half = NORMAL_QUANTILE * np.hypot(np.divide(error_a, value_a), np.divide(error_b, value_b))
            low, high = estimate * np.exp(-half), estimate * np.exp(half)
    else:
        half = NORMAL_QUANTILE * np.hypot(error_a, error_b)
        low, high = estimate - half, estimate + half
    if not np.isfinite([estimate, low, high]).all():
        return Comparison(estimate, np.nan, np.nan, "none")
    significant = (low > nothing or high < nothing) and min(n_a, n_b) >= FEWEST_DIFFERING
    return Comparison(estimate, float(low), float(high), "standard errors", significant=bool(significant))


@lru_cache(maxsize=4)
def _draws(n: int) -> np.ndarray:
    """Return [replicates, n]: how often each replicate draws each of n documents; always the same for the same n."""
    replicates = int(np.clip(10_000_000 // n, 1_000, 10_000))
    random = np.random.default_rng(0)
    return np.stack([np.bincount(random.integers(0, n, n), minlength=n) for _ in range(replicates)]).astype(np.float32)


def _replicates(documents: pd.DataFrame, form: str, higher_is_better: bool) -> np.ndarray:
    """Return [replicates]: the metric on each draw; the worst infinity if a draw has a document that is not finite."""
    values = documents[["total", "weight"]].to_numpy(float)
    broken = ~np.isfinite(values).all(axis=1)
    draws = _draws(len(values))
    with np.errstate(all="ignore"):
        sums = draws @ np.where(broken[:, None], 0.0, values)
        drawn = METRIC_FORMS[form](sums[:, 0] / sums[:, 1])
    hit = draws @ broken.astype(np.float32) > 0
    return _worst_for_nan(np.where(hit, np.nan, drawn), higher_is_better)


def _point(documents: pd.DataFrame, form: str, higher_is_better: bool) -> np.ndarray:
    return _worst_for_nan(np.array(evaluate(documents, form)), higher_is_better)


def _worst_for_nan(values: np.ndarray, higher_is_better: bool) -> np.ndarray:
    return np.where(np.isnan(values), -np.inf if higher_is_better else np.inf, values)


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.where(a == b, 0.0, a - b)  # two infinities of one sign are a tie, not NaN


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.where(a == b, 1.0, a / b)


def _percentiles(drawn: np.ndarray) -> tuple[float, float]:
    tail = 50 * (1 - LEVEL)
    # An interval's end is a value that was drawn: interpolation between two infinities would be NaN.
    low, high = np.percentile(drawn, [tail, 100 - tail], method="nearest")
    return float(low), float(high)
