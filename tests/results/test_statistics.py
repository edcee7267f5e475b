"""The statistics, against direct computation on known data."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from lminf_eval.report.paired_bootstrap import (
    METRIC_FORMS,
    Comparison,
    bootstrap_interval,
    compare,
    compare_by_errors,
    evaluate,
    find_metric_form,
)


def documents(totals, weights=1.0, index=None) -> pd.DataFrame:
    totals = np.asarray(totals, float)
    return pd.DataFrame({"total": totals, "weight": np.broadcast_to(weights, totals.shape).astype(float)}, index=index)


@pytest.fixture
def random():
    return np.random.default_rng(7)


@pytest.mark.parametrize(
    ("link", "direct"),
    [
        ("mean", lambda a, b: a.sum() / b.sum()),
        ("exp(-mean)", lambda a, b: math.exp(-a.sum() / b.sum())),
        ("exp(mean)", lambda a, b: math.exp(a.sum() / b.sum())),
        ("-mean", lambda a, b: -a.sum() / b.sum()),
        ("-mean/ln 2", lambda a, b: -a.sum() / b.sum() / math.log(2)),
        ("mean/ln 2", lambda a, b: a.sum() / b.sum() / math.log(2)),
    ],
)
def test_link_is_found_by_the_reported_value(link, direct, random):
    totals, weights = -random.uniform(50, 300, 9), random.integers(40, 90, 9)
    value = direct(totals, weights)
    assert evaluate(documents(totals, weights), link) == pytest.approx(value, rel=1e-12)
    assert find_metric_form([(documents(totals, weights), value)]) == link


def test_no_link_for_a_statistic_that_is_not_of_the_known_form(random):
    values = random.normal(size=9)
    assert find_metric_form([(documents(values), float(np.median(values)) + 0.01)]) is None


def test_link_needs_every_run_to_agree_and_passes_over_what_is_not_finite():
    a, b = documents([1.0, 1.0]), documents([2.0, 4.0])
    assert find_metric_form([(a, 1.0), (b, 3.0), (a, math.nan)]) == "mean"
    assert find_metric_form([(a, 1.0), (b, 2.9)]) is None
    assert find_metric_form([(a, math.inf)]) is None


def test_standard_error_of_a_mean_is_the_plug_in_one(random):
    values = random.normal(size=60)
    error, low, high = bootstrap_interval(documents(values), "mean", True)
    assert error == pytest.approx(values.std() / math.sqrt(60), rel=0.03)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_interval_is_that_of_every_possible_draw():
    """Three documents have 27 draws, each as likely: the percentiles are known exactly."""
    totals, weights = np.array([-10.0, -30.0, -80.0]), np.array([10.0, 20.0, 30.0])
    every = [
        math.exp(-totals[list(draw)].sum() / weights[list(draw)].sum())
        for draw in itertools.product(range(3), repeat=3)
    ]
    error, low, high = bootstrap_interval(documents(totals, weights), "exp(-mean)", False)
    assert (low, high) == pytest.approx((min(every), max(every)), rel=1e-6)  # 1 / 27 is more than 2.5%
    assert error == pytest.approx(np.std(every), rel=0.03)


def test_paired_interval_is_the_binomial_one():
    """Differences of 0 and 1 only: a draw's mean is a binomial count over n, whose percentiles are known exactly."""
    n, k = 40, 12
    a, b = documents([1.0] * k + [0.0] * (n - k)), documents([0.0] * n)
    found = compare(a, b, "mean", True)
    mass = [math.comb(n, i) * (k / n) ** i * (1 - k / n) ** (n - i) for i in range(n + 1)]
    low = next(i for i in range(n + 1) if sum(mass[: i + 1]) >= 0.025) / n
    high = next(i for i in range(n + 1) if sum(mass[: i + 1]) >= 0.975) / n
    assert found == Comparison(k / n, pytest.approx(low), pytest.approx(high), "paired bootstrap", n, k, 0, True)


def test_pairing_cancels_what_the_documents_share(random):
    difficulty = random.normal(size=50) * 5
    a, b = documents(difficulty + 0.3), documents(difficulty + random.normal(size=50) * 0.1)
    paired = compare(a, b, "mean", True)
    differences = a["total"] - b["total"]
    assert paired.estimate == pytest.approx(differences.mean())
    assert paired.high - paired.low == pytest.approx(2 * 1.96 * differences.std() / math.sqrt(50), rel=0.1)
    assert paired.significant
    errors = [bootstrap_interval(one, "mean", True)[0] for one in (a, b)]
    apart = compare_by_errors((a["total"].mean(), errors[0], 50), (b["total"].mean(), errors[1], 50))
    assert not apart.significant
    assert apart.high - apart.low > 10 * (paired.high - paired.low)


def test_ratio_of_perplexities_is_the_ratio_of_direct_ones(random):
    totals, weights = -random.uniform(200, 300, 12), random.integers(80, 120, 12)
    a, b = documents(totals * 0.9, weights), documents(totals, weights)
    found = compare(a, b, "exp(-mean)", False, ratio=True)
    assert found.estimate == pytest.approx(math.exp(0.1 * totals.sum() / weights.sum()))
    assert found.low < found.estimate < found.high < 1
    assert found.significant
    assert compare(b, a, "exp(-mean)", False, ratio=True).low > 1


def test_ties_have_no_winner():
    same = documents([0, 1, 1, 0, 1, 1, 0, 1])
    assert compare(same, same.copy(), "mean", True) == Comparison(0.0, 0.0, 0.0, "paired bootstrap", 8, 0, 0, False)


def test_six_documents_that_differ_are_the_fewest():
    for differing, significant in ((5, False), (6, True)):
        a = documents([1.0] * differing + [0.0] * 14)
        b = documents([0.0] * (differing + 14))
        found = compare(a, b, "mean", True)
        assert found.low > 0
        assert (found.differing, found.significant) == (differing, significant)


def test_one_document_has_no_interval():
    one = compare(documents([1.0]), documents([0.0]), "mean", True)
    assert (one.estimate, one.documents, one.significant) == (1.0, 1, False)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert all(map(math.isnan, bootstrap_interval(documents([1.0]), "mean", True)))


def test_missing_documents_are_left_out_and_counted():
    a = documents([1.0] * 10, index=[f"d{i}" for i in range(10)])
    b = documents([0.0] * 9, index=[f"d{i}" for i in range(2, 11)])
    found = compare(a, b, "mean", True)
    assert (found.documents, found.unmatched, found.estimate) == (8, 3, 1.0)
    order = b.sample(frac=1, random_state=0)
    assert compare(a, order, "mean", True) == found


def test_no_common_document_is_no_evidence():
    found = compare(documents([1.0], index=["x"]), documents([0.0], index=["y"]), "mean", True)
    assert (found.documents, found.unmatched, found.how, found.significant) == (0, 2, "none", False)
    assert math.isnan(found.estimate)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_value_that_is_not_finite_has_lost(bad):
    good, diverged = documents([-3.0] * 8), documents([bad] * 8)
    found = compare(good, diverged, "exp(-mean)", False)
    assert (found.estimate, found.low, found.high, found.significant) == (-math.inf, -math.inf, -math.inf, True)
    assert compare(diverged, good, "exp(-mean)", False).significant
    both = compare(diverged, diverged.copy(), "exp(-mean)", False)
    assert (both.estimate, both.significant) == (0.0, False)


def test_one_diverged_document_among_many_leaves_the_interval_open():
    good = documents([-3.0, -3.1, -2.9, -3.2, -3.0, -2.8, -3.1, -3.0])
    some = good.copy()
    some.iloc[0, 0] = math.nan
    found = compare(some, good, "exp(-mean)", False)
    assert (found.high, found.significant) == (math.inf, False)


def test_comparison_by_standard_errors():
    found = compare_by_errors((0.9, 0.03, 50), (0.7, 0.04, 50))
    half = 1.959964 * 0.05
    assert (found.estimate, found.low, found.high) == pytest.approx((0.2, 0.2 - half, 0.2 + half))
    assert found.significant
    assert not compare_by_errors((0.9, 0.03, 5), (0.7, 0.04, 50)).significant
    ratio = compare_by_errors((8.0, 0.08, 50), (10.0, 0.0, 50), ratio=True)
    ends = [0.8 * math.exp(sign * 1.959964 * 0.01) for sign in (-1, 1)]
    assert (ratio.estimate, ratio.low, ratio.high) == pytest.approx((0.8, *ends))
    assert ratio.significant
    assert compare_by_errors((0.9, math.nan, 50), (0.7, 0.04, 50)).how == "none"


def test_large_and_small_samples_draw_the_same_every_time(random):
    for n in (2, 3000):
        values = documents(random.normal(size=n))
        assert bootstrap_interval(values, "mean", True) == bootstrap_interval(values.copy(), "mean", True)


def test_every_link_is_monotone():
    """Otherwise the order of two methods would depend on more than the ratio of their sums."""
    ratio = np.linspace(-3, 3, 50)
    for link in METRIC_FORMS.values():
        steps = np.diff(link(ratio))
        assert (steps > 0).all() or (steps < 0).all()
