"""Parsing of numbers as people write them in tables and on command lines (125M, 7B, 1e21), and their formatting."""

from __future__ import annotations

import math
import re

_NUMBER = re.compile(
    r"\s*([+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?|[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
    r"(?:\s*[x×*]\s*10\s*(?:\^|\*\*)\s*\+?(-?[0-9]+))?"
    r"\s*([kKmMbBgGtT]?|thousand|million|billion|trillion)(?:\s+(?:params|parameters|tokens|flops))?\s*",
    re.IGNORECASE,
)
"""A comma separates thousands ("1,000,000"), so "3,45" does not parse."""
_FACTORS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_LARGEST = 999.5e12


def parse_number(value: object) -> float | None:
    """The number in a cell or an option; NaN if it is empty, None if it does not parse.

    The suffixes k, M, B (or G) and T, in upper or lower case, and "million" and the like, are powers of a thousand
    ("125m", "7B tokens"). A power of ten may follow a number ("1.3 x 10^9").
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return math.nan
    if isinstance(value, (int, float)):
        return float(value)
    text = str(value)
    try:
        return float(text)
    except ValueError:
        match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    digits = match.group(1).replace("_", "").replace(",", "")
    return float(digits) * 10.0 ** int(match.group(2) or 0) * _FACTORS[match.group(3)[:1].lower()]


def count(value: float, digits: int = 3) -> str:
    """A count of parameters, tokens or FLOPs as text: "16.2B"; from 1e15 on and below 1e-3 in the form "1.3e+20"."""
    size = abs(value)
    if not math.isfinite(value):
        return "n/a"
    if size >= _LARGEST or 0 < size < 1e-3:
        return f"{value:.{digits}g}"
    for factor, suffix in _SUFFIXES:
        if size >= factor * 0.9995:
            return f"{value / factor:.{digits}g}{suffix}"
    return f"{value:.{digits}g}"


def nats(value: float) -> str:
    """A loss as text, with 5 digits after the decimal point."""
    return f"{value:.5f}" if math.isfinite(value) else "n/a"
