"""Model error in intervals: the errors of back-tests beyond their own intervals, extrapolated to larger budgets.

This module needs only the standard library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def misfit_rate(tests: Sequence[tuple[float, float]]) -> float:
    """Misfit of the log loss per e-fold of FLOPs beyond the fitted runs: the root mean square over back-tests.

    Args:
        tests: For each back-test its misfit, the log error beyond the interval's half-width, and its factor of FLOPs.
    """
    if not tests:
        return 0.0
    rates = [(misfit / math.log(max(factor, 1.5))) ** 2 for misfit, factor in tests]
    return math.sqrt(sum(rates) / len(rates))


def widened(value: float, ends: Sequence[float], rate: float, efolds: float, normal: float = 1.96) -> list[float]:
    """The interval of a loss with the misfit added in quadrature.

    Args:
        value: The loss.
        ends: The interval without misfit.
        rate: The result of `misfit_rate`.
        efolds: ln of the ratio of the FLOPs to those of the largest fitted run; a negative value adds no misfit.
        normal: Half-width of the interval in standard deviations of a normal distribution.
    """
    extra = normal * rate * max(efolds, 0.0)
    low, high = (math.log(max(end, 1e-300) / value) for end in ends)
    return [value * math.exp(-math.hypot(min(low, 0.0), extra)), value * math.exp(math.hypot(max(high, 0.0), extra))]
