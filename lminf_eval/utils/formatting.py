"""Numbers, bytes and durations as people read them; every message and table of the package uses these."""

from __future__ import annotations

import math

_UNKNOWN = "?"


def format_bytes(n_bytes: float | None) -> str:
    """Return bytes in powers of a thousand, such as "1.3 GB", "25 MB" or "512 B"; "?" for None."""
    if n_bytes is None:
        return _UNKNOWN
    for size, unit, digits in ((1e12, "TB", 1), (1e9, "GB", 1), (1e6, "MB", 0), (1e3, "kB", 0)):
        if abs(n_bytes) >= size:
            return f"{n_bytes / size:.{digits}f} {unit}"
    return f"{n_bytes:.0f} B"


def format_count(count: float | None) -> str:
    """Return a large count with three significant digits and a suffix: "65.5k", "1.05M", "2G"; "?" for None."""
    if count is None:
        return _UNKNOWN
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def format_clock(seconds: float | None) -> str:
    """Return seconds as hours:minutes:seconds, such as "1:02:03"; "?" for None."""
    if seconds is None:
        return _UNKNOWN
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{left:02d}"


def format_estimate(seconds: float) -> str:
    """Return a rough duration, such as "45 s" or "12 min", at least one second."""
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(1, round(seconds))} s"


def format_measurement(value: float) -> str:
    """Return a measured value with three significant digits; large ones as whole numbers with thousands separators."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def format_metric(value: float) -> str:
    """Return the value of a metric: four digits, three decimals of a small one (a loss), and a true minus sign."""
    if math.isnan(value):
        return "NaN"
    if 0 < abs(value) < 0.001:
        return f"{value:.1g}".replace("-", "−")
    digits = 3 if abs(value) < 20 else 2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0
    return f"{value:.{digits}f}".replace("-", "−")
