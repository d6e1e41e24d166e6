"""What the parametric fit (approach 3) minimises, for one set of parameters or for many at once.

Huber and L1 act on the residual of the log loss, ln L^ - ln L (Hoffmann et al. 2022, eq. 3), squares on that of the
loss itself. All are sums over the runs, never means: a mean of losses of a few thousandths lies under an optimiser's
default tolerances, and it stops wherever it began. N and D are centred on their geometric means, which takes most
of the correlation between A and alpha, and between B and beta, away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bigtrain.scaling.law import FloatArray

LossFunction = Literal["huber", "l1", "squares"]
LOSS_FUNCTIONS: tuple[LossFunction, ...] = ("huber", "l1", "squares")
DEFAULT_DELTA = 1e-3
"""Hoffmann et al. 2022: residuals of the log loss beyond a thousandth count linearly."""
L1_DELTAS = (1e-4, 1e-5, 1e-6)
"""L1 is the limit of Huber / delta: followed from DEFAULT_DELTA down to where its parameters stand still."""


@dataclass(frozen=True)
class Problem:
    """The runs that a law is fitted to, and what is minimised."""

    ln_n: FloatArray
    """Shape (n,), centred."""
    ln_d: FloatArray
    """Shape (n,), centred."""
    ln_loss: FloatArray
    """Shape (n,)."""
    center: tuple[float, float]
    """Means of ln N and ln D that were taken away."""
    function: LossFunction = "huber"
    delta: float = DEFAULT_DELTA
    equal_exponents: bool = False
    """Whether alpha = beta is required."""

    @classmethod
    def of(
        cls,
        params: FloatArray,
        tokens: FloatArray,
        losses: FloatArray,
        function: LossFunction = "huber",
        delta: float = DEFAULT_DELTA,
        equal_exponents: bool = False,
    ) -> Problem:
        """The problem of n runs: N, D and losses of shape (n,)."""
        ln_n, ln_d = np.log(params), np.log(tokens)
        center = (float(ln_n.mean()), float(ln_d.mean()))
        return cls(
            ln_n - center[0], ln_d - center[1], np.log(losses), center, function, delta, equal_exponents
        )  # fmt: skip

    @property
    def deltas(self) -> Sequence[float]:
        """The deltas to go through, each from the solution of the one before."""
        return (DEFAULT_DELTA, *L1_DELTAS) if self.function == "l1" else (self.delta,)

    @property
    def basis(self) -> FloatArray:
        """Shape (5, p): how the p free parameters make the five; the identity, or alpha = beta joined."""
        return np.array(np.eye(5)[:, :4] + np.eye(5)[:, 4:] @ np.eye(4)[3:]) if self.equal_exponents else np.eye(5)

    def uncentred(self, theta: FloatArray) -> FloatArray:
        """Parameters of N and D themselves, from those of the centred ones; shape (..., 5)."""
        out = np.array(theta)
        out[..., 0] += out[..., 3] * self.center[0]
        out[..., 1] += out[..., 4] * self.center[1]
        return out

    def centred(self, theta: FloatArray) -> FloatArray:
        """The inverse of `uncentred`."""
        out = np.array(theta)
        out[..., 0] -= out[..., 3] * self.center[0]
        out[..., 1] -= out[..., 4] * self.center[1]
        return out


@dataclass(frozen=True)
class Terms:
    """The law's three terms and the residuals at R sets of parameters."""

    parts: FloatArray
    """Shape (3, R, n): the terms themselves for squares, their shares of the loss for Huber and L1."""
    residual: FloatArray
    """Shape (R, n)."""


def terms(problem: Problem, theta: FloatArray) -> Terms:
    """Terms and residuals.

    Args:
        theta: Shape (R, 5), centred.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        parts = np.empty((3, len(theta), len(problem.ln_n)))
        np.exp(theta[:, :1] - theta[:, 3:4] * problem.ln_n, out=parts[0])
        np.exp(theta[:, 1:2] - theta[:, 4:5] * problem.ln_d, out=parts[1])
        parts[2] = np.exp(theta[:, 2:3])
        total = parts[0] + parts[1] + parts[2]
        if problem.function == "squares":
            return Terms(parts, total - np.exp(problem.ln_loss))
        return Terms(parts / total, np.log(total) - problem.ln_loss)


def rho(problem: Problem, residual: FloatArray, delta: float) -> FloatArray:
    """What one residual costs, same shape. For Huber and L1 divided by delta, so that L1's limit exists."""
    if problem.function == "squares":
        return 0.5 * residual**2
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * size**2 / delta, size - 0.5 * delta)


def value(problem: Problem, weights: FloatArray, theta: FloatArray, delta: float) -> FloatArray:
    """The scaled objective at R sets of parameters; infinite where it overflows.

    Args:
        weights: Shape (R, n), how often each run counts.
        theta: Shape (R, 5), centred.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.einsum("rn,rn->r", weights, rho(problem, terms(problem, theta).residual, delta))
    return np.where(np.isfinite(total), total, np.inf)


def reported(problem: Problem, scaled: FloatArray) -> FloatArray:
    """The objective as it is published: Huber's sum itself, the sum of |residuals|, the sum of squares."""
    factor = {"huber": problem.delta, "l1": 1.0, "squares": 2.0}[problem.function]
    return scaled * factor


def value_and_gradient(problem: Problem, free: FloatArray, delta: float) -> tuple[float, FloatArray]:
    """The scaled objective and its analytic gradient at one set of free parameters, for L-BFGS.

    Args:
        free: Shape (p,), centred.
    """
    basis = problem.basis
    at = terms(problem, (basis @ free)[None])
    residual, parts = at.residual[0], at.parts[:, 0]
    slope = residual if problem.function == "squares" else np.clip(residual / delta, -1.0, 1.0)
    pull = slope * parts
    gradient = np.array([pull[0].sum(), pull[1].sum(), pull[2].sum(), -pull[0] @ problem.ln_n, -pull[1] @ problem.ln_d])
    return float(rho(problem, residual, delta).sum()), basis.T @ gradient
