"""Short formats of numbers and durations for human readers: 41.2k, 3m10s."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Any

_SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def finite(value: Any) -> float | None:
    """The value as a float if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def short(value: float) -> str:
    """Format a number with three significant digits and a suffix k, M, G or T: 41234 is "41.2k"."""
    for factor, suffix in _SUFFIXES:
        if abs(value) >= factor * 0.9995:
            return f"{value / factor:.3g}{suffix}" if abs(value) < factor * 999.5 else f"{value / factor:.0f}{suffix}"
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"


def span(seconds: float) -> str:
    """Format a duration in seconds by its two largest units: "42s", "3m10s", "5h02m", "2d03h"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def timestamp(value: Any) -> float | None:
    """Unix time in seconds of an event's `time`, which is a number or an ISO 8601 text; None for other values."""
    number = finite(value)
    if number is not None or not isinstance(value, str):
        return number
    try:
        return datetime.fromisoformat(value).timestamp()
    except ValueError:
        return None
