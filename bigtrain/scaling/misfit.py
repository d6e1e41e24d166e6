"""Model error in intervals: what back-tests saw beyond their own intervals, carried to larger budgets. NumPy alone."""

from __future__ import annotations

import math
from collections.abc import Sequence


def misfit_rate(tests: Sequence[tuple[float, float]]) -> float:
    """Misfit of the log loss per e-fold of FLOPs beyond the fitted runs: the root mean square over back-tests.

    Args:
        tests: Misfit (the log error beyond its interval's half-width) and factor of FLOPs of each.
    """
    if not tests:
        return 0.0
    rates = [(misfit / math.log(max(factor, 1.5))) ** 2 for misfit, factor in tests]
    return math.sqrt(sum(rates) / len(rates))


def widened(value: float, ends: Sequence[float], rate: float, efolds: float, normal: float = 1.96) -> list[float]:
    """An interval of a loss with misfit added in quadrature.

    Args:
        value: The loss itself.
        ends: Its interval without misfit.
        rate: As `misfit_rate` gives it.
        efolds: ln of the FLOPs over those of the largest fitted run; nothing is added where it is negative.
        normal: Standard deviations that the interval's half-width stands for.
    """
    extra = normal * rate * max(efolds, 0.0)
    low, high = (math.log(max(end, 1e-300) / value) for end in ends)
    return [value * math.exp(-math.hypot(min(low, 0.0), extra)), value * math.exp(math.hypot(max(high, 0.0), extra))]
