"""How numbers, bytes and durations are printed."""

import math

import pytest

from lminf_eval.utils.formatting import (
    format_bytes,
    format_clock,
    format_count,
    format_estimate,
    format_measurement,
    format_metric,
)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (512, "512 B"), (2_500, "2 kB"), (25e6, "25 MB"), (1.34e9, "1.3 GB"), (2e12, "2.0 TB"), (None, "?")],
)
def test_bytes(n_bytes, text):
    assert format_bytes(n_bytes) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (65_536, "65.5k"), (2**20, "1.05M"), (2e9, "2G"), (None, "?")]
)
def test_counts(count, text):
    assert format_count(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00:00"), (3723.4, "1:02:03"), (None, "?")])
def test_clock(seconds, text):
    assert format_clock(seconds) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "1 s"), (45, "45 s"), (89.6, "90 s"), (720, "12 min")])
def test_estimates(seconds, text):
    assert format_estimate(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(12345.6, "12,346"), (99.96, "100"), (0.012345, "0.0123")])
def test_measurements(value, text):
    assert format_measurement(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(math.nan, "NaN"), (-0.0004, "−0.0004"), (5.12345, "5.123"), (51.2345, "51.23"), (1234.5, "1234")],
)
def test_metrics(value, text):
    assert format_metric(value) == text
