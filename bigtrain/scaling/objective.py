"""The objective of the parametric fit (approach 3), for one or many parameter vectors.

The loss functions "huber" and "l1" act on the residual of the log loss, ln L^ - ln L (Hoffmann et al. 2022, eq. 3);
"squares" acts on the residual of the loss. Each objective is a sum over the runs. A mean of such small values would be
below the default tolerances of an optimiser, which would stop at its start. N and D are centred on their geometric
means, which removes most of the correlation between A and alpha, and between B and beta.
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
"""Delta of the Huber loss (Hoffmann et al. 2022): larger residuals of the log loss count linearly."""
L1_DELTAS = (1e-4, 1e-5, 1e-6)
"""Deltas of the L1 fit, after DEFAULT_DELTA. L1 is the limit of Huber / delta for small delta; at the last of these
deltas the parameters no longer change."""


@dataclass(frozen=True)
class Problem:
    """The runs to which a law is fitted, and the objective of the fit."""

    ln_n: FloatArray
    """ln N minus its mean, shape (n,)."""
    ln_d: FloatArray
    """ln D minus its mean, shape (n,)."""
    ln_loss: FloatArray
    """ln of the measured losses, shape (n,)."""
    center: tuple[float, float]
    """The means of ln N and ln D."""
    function: LossFunction = "huber"
    delta: float = DEFAULT_DELTA
    """Delta of the Huber loss; the other loss functions ignore it."""
    equal_exponents: bool = False
    """Whether the fit requires alpha = beta."""

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
        """The problem of n runs, with N, D and losses of shape (n,)."""
        ln_n, ln_d = np.log(params), np.log(tokens)
        center = (float(ln_n.mean()), float(ln_d.mean()))
        return cls(
            ln_n - center[0], ln_d - center[1], np.log(losses), center, function, delta, equal_exponents
        )  # fmt: skip

    @property
    def deltas(self) -> Sequence[float]:
        """The deltas to fit with, one after another, each starting from the solution for the previous delta."""
        return (DEFAULT_DELTA, *L1_DELTAS) if self.function == "l1" else (self.delta,)

    @property
    def basis(self) -> FloatArray:
        """The matrix, shape (5, p), that maps the p free parameters to (ln A, ln B, ln E, alpha, beta).

        It is the identity, or with `equal_exponents` it maps one free parameter to both alpha and beta.
        """
        return np.array(np.eye(5)[:, :4] + np.eye(5)[:, 4:] @ np.eye(4)[3:]) if self.equal_exponents else np.eye(5)

    def uncentred(self, theta: FloatArray) -> FloatArray:
        """Parameters for N and D, computed from parameters for centred N and D; shape (..., 5)."""
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
    """The law's three terms and the residuals, for R parameter vectors."""

    parts: FloatArray
    """The terms for A, B and E, shape (3, R, n); for Huber and L1 divided by the predicted loss."""
    residual: FloatArray
    """Residuals, predicted minus measured, shape (R, n): of the loss for squares, of its logarithm for Huber and L1."""


def terms(problem: Problem, theta: FloatArray) -> Terms:
    """The law's terms and the residuals of each run.

    Args:
        problem: The runs.
        theta: Centred parameters, shape (R, 5).
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
    """The loss function of each residual, in the shape of `residual`.

    For Huber and L1 it is divided by delta, so that the limit for small delta is L1.
    """
    if problem.function == "squares":
        return 0.5 * residual**2
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * size**2 / delta, size - 0.5 * delta)


def value(problem: Problem, weights: FloatArray, theta: FloatArray, delta: float) -> FloatArray:
    """The scaled objective of R parameter vectors, shape (R,); infinite where it overflows.

    Args:
        problem: The runs and the loss function.
        weights: How often each run counts, shape (R, n).
        theta: Centred parameters, shape (R, 5).
        delta: Delta of the Huber loss.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.einsum("rn,rn->r", weights, rho(problem, terms(problem, theta).residual, delta))
    return np.where(np.isfinite(total), total, np.inf)


def reported(problem: Problem, scaled: FloatArray) -> FloatArray:
    """The objective in the usual scale: the sum of the Huber loss, of |residual|, or of squared residuals."""
    factor = {"huber": problem.delta, "l1": 1.0, "squares": 2.0}[problem.function]
    return scaled * factor


def value_and_gradient(problem: Problem, free: FloatArray, delta: float) -> tuple[float, FloatArray]:
    """The scaled objective and its analytic gradient of shape (p,), for L-BFGS.

    Args:
        problem: The runs and the loss function.
        free: Centred free parameters, shape (p,).
        delta: Delta of the Huber loss.
    """
    basis = problem.basis
    at = terms(problem, (basis @ free)[None])
    residual, parts = at.residual[0], at.parts[:, 0]
    slope = residual if problem.function == "squares" else np.clip(residual / delta, -1.0, 1.0)
    pull = slope * parts
    gradient = np.array([pull[0].sum(), pull[1].sum(), pull[2].sum(), -pull[0] @ problem.ln_n, -pull[1] @ problem.ln_d])
    return float(rho(problem, residual, delta).sum()), basis.T @ gradient
