"""How far a law lies from its runs in a systematic way, and what that says of a run near them. NumPy alone.

The residuals ln L - ln L^ are taken as noise and a smooth function of (ln N, ln D), a Gaussian process (Kennedy and
O'Hagan 2001: model discrepancy). Its size and its length are those of the highest likelihood; without evidence for it
(2 units of ln likelihood, as Akaike's criterion asks of two parameters) it is zero and the residuals are noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bigtrain.scaling.law import FloatArray

LENGTHS = (1.0, 2.0, 4.0)
"""In ln N and ln D."""
SHARES = (0.25, 1.0, 4.0, 16.0, 64.0)
"""Variance of the function over that of the noise."""
EVIDENCE = 2.0


@dataclass(frozen=True)
class Discrepancy:
    """The systematic part at one (N, D)."""

    mean: float
    """Of ln L - ln L^."""
    deviation: float
    """Of that mean."""
    noise: float
    """Standard deviation of one run around law and systematic part, in ln L."""


def discrepancy(params: FloatArray, tokens: FloatArray, residuals: FloatArray, at: tuple[float, float],
                parameters: int) -> Discrepancy:  # fmt: skip
    """The systematic part at (N, D).

    Args:
        params: N of the runs, shape (n,).
        tokens: D, likewise.
        residuals: ln measured - ln predicted, likewise.
        at: N and D of the run to come.
        parameters: Of the law, which the residuals have lost.
    """
    points = np.column_stack([np.log(params), np.log(tokens)])
    squares = ((points[:, None] - points) ** 2).sum(axis=2)
    to_new = ((points - np.log(at)) ** 2).sum(axis=1)
    count = len(residuals)
    dof = max(count - parameters, 1)

    def fitted(share: float, length: float) -> tuple[float, FloatArray, float]:
        """The ln likelihood, the covariance over the noise's variance, and that variance."""
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
