"""The systematic difference between a law and its runs, predicted for a new run; needs only NumPy.

The residuals ln L - ln L^ are modelled as the sum of noise and a smooth function of (ln N, ln D), a Gaussian process
(model discrepancy, Kennedy and O'Hagan 2001). The variance and the length scale of the function have the highest
likelihood of a grid. If they do not raise the log likelihood by 2, as Akaike's criterion requires of two parameters,
the function is zero and all residuals are noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bigtrain.scaling.law import FloatArray

LENGTHS = (1.0, 2.0, 4.0)
"""Length scales to try, in units of ln N and ln D."""
SHARES = (0.25, 1.0, 4.0, 16.0, 64.0)
"""Ratios to try of the function's variance to the noise's variance."""
EVIDENCE = 2.0
"""Least gain of the log likelihood for which the function is used."""


@dataclass(frozen=True)
class Discrepancy:
    """The systematic part of the residuals at one (N, D)."""

    mean: float
    """Mean of the systematic part of ln L - ln L^."""
    deviation: float
    """Standard deviation of the systematic part."""
    noise: float
    """Standard deviation of ln L of one run around the law and the systematic part."""


def discrepancy(params: FloatArray, tokens: FloatArray, residuals: FloatArray, at: tuple[float, float],
                parameters: int) -> Discrepancy:  # fmt: skip
    """Predict the systematic part of the residuals at one (N, D).

    Args:
        params: N of the runs, shape (n,).
        tokens: D of the runs, shape (n,).
        residuals: ln measured - ln predicted of the runs, shape (n,).
        at: N and D of the new run.
        parameters: Number of fitted parameters of the law, by which the degrees of freedom are reduced.
    """
    points = np.column_stack([np.log(params), np.log(tokens)])
    squares = ((points[:, None] - points) ** 2).sum(axis=2)
    to_new = ((points - np.log(at)) ** 2).sum(axis=1)
    count = len(residuals)
    dof = max(count - parameters, 1)

    def fitted(share: float, length: float) -> tuple[float, FloatArray, float]:
        """The log likelihood, the covariance divided by the noise's variance, and the noise's variance."""
        covariance = share * np.exp(-squares / (2 * length**2)) + np.eye(count)
        variance = float(residuals @ np.linalg.solve(covariance, residuals)) / dof
        return -0.5 * (count * np.log(max(variance, 1e-30)) + np.linalg.slogdet(covariance)[1]), covariance, variance

    plain = fitted(0.0, 1.0)
    best, share, length = max(
        ((fitted(share, length), share, length) for share in SHARES for length in LENGTHS), key=lambda one: one[0][0]
    )
    if best[0] < plain[0] + EVIDENCE:
        return Discrepancy(0.0, 0.0, float(np.sqrt(plain[2])))
    _, covariance, variance = best
    near = share * np.exp(-to_new / (2 * length**2))
    weights = np.linalg.solve(covariance, near)
    left = max(share - float(near @ weights), 0.0)
    return Discrepancy(float(weights @ residuals), float(np.sqrt(variance * left)), float(np.sqrt(variance)))
