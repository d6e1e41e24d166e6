"""Approach 3: the law fitted to all runs, from many starts and once more without any."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from bigtrain.scaling.batched import EXPONENT_RANGE, LN_RANGE, SAME, descend, project, robust_weights
from bigtrain.scaling.law import FloatArray
from bigtrain.scaling.objective import Problem, reported, terms, value_and_gradient

STARTS = 32
_PROJECTIONS = 4


@dataclass(frozen=True)
class ParametricFit:
    """The minimum, and how it was found."""

    problem: Problem
    centred: FloatArray
    """Shape (5,)."""
    theta: FloatArray
    """Shape (5,), (ln A, ln B, ln E, alpha, beta) of N and D themselves."""
    objective: float
    """As it is published: the sum of Huber's function, of |residuals|, of squares."""
    starts: int
    converged_starts: float
    """Share of the starts from which L-BFGS reached the minimum."""
    projection_objective: float
    """What variable projection reached, without a start."""
    condition_number: float
    """Of the Jacobian at the minimum, with columns of unit length: large where the parameters are not identifiable."""
    residuals: FloatArray
    """Shape (n,): ln predicted - ln measured."""


def fit(problem: Problem, seed: int = 0, starts: int = STARTS) -> ParametricFit:
    """The law's parameters.

    Multi-start L-BFGS with an analytic gradient and variable projection go down independently; Newton's method ends
    both, and the lower one counts.

    Args:
        problem: The runs and what is minimised.
        seed: Of the random starts.
        starts: How many.
    """
    one = np.ones((1, len(problem.ln_loss)))
    projected = project(problem, one)
    for _ in range(_PROJECTIONS):
        projected = project(problem, one, robust_weights(problem, projected[0]))
    found, reached, _ = descend(problem, one, projected)
    begins = _starts(problem, seed, starts)
    first = problem.deltas[0]
    ends = [_lbfgs(problem, begin, first) for begin in begins]
    best = min(ends, key=lambda end: end[0]) if ends else (np.inf, found[0])
    again, lowest, _ = descend(problem, one, best[1][None])
    theta = again[0] if lowest[0] < reached[0] else found[0]
    floor = float(min(lowest[0], reached[0]))
    at_first = value_and_gradient(problem, np.linalg.pinv(problem.basis) @ theta, first)[0]
    target = min(at_first, best[0])
    share = float(np.mean([end[0] <= target * (1 + 100 * SAME) for end in ends])) if ends else 1.0
    return ParametricFit(
        problem, theta, problem.uncentred(theta), float(reported(problem, np.array(floor))), len(ends), share,
        float(reported(problem, reached)[0]), condition_number(problem, theta), residuals(problem, theta),
    )  # fmt: skip


def residuals(problem: Problem, theta: FloatArray) -> FloatArray:
    """ln predicted - ln measured at centred parameters, shape (n,)."""
    at = terms(problem, theta[None])
    if problem.function == "squares":
        return np.asarray(np.log1p(at.residual[0] / np.exp(problem.ln_loss)), dtype=np.float64)
    return at.residual[0]


def condition_number(problem: Problem, theta: FloatArray) -> float:
    """Of the Jacobian of the log loss in the free parameters, columns scaled to unit length."""
    jacobian = log_jacobian(theta, problem.ln_n, problem.ln_d) @ problem.basis
    return float(np.linalg.cond(jacobian / np.linalg.norm(jacobian, axis=0)))


def log_jacobian(theta: FloatArray, ln_n: FloatArray, ln_d: FloatArray) -> FloatArray:
    """Derivatives of ln L by the five parameters, shape (n, 5).

    Args:
        theta: Shape (5,), in the same centring as ln_n and ln_d.
    """
    parts = np.exp([theta[0] - theta[3] * ln_n, theta[1] - theta[4] * ln_d, np.full_like(ln_n, theta[2])])
    share = parts / parts.sum(axis=0)
    return np.column_stack([share[0], share[1], share[2], -share[0] * ln_n, -share[1] * ln_d])


def _starts(problem: Problem, seed: int, count: int) -> list[FloatArray]:
    """Free parameters to start from: exponents over the published range, the loss divided among the terms at random."""
    generator = np.random.default_rng((seed, 1))
    middle = float(problem.ln_loss.mean())
    out = []
    for _ in range(count):
        shares = generator.dirichlet(np.ones(3))
        theta = np.concatenate([middle + np.log(np.maximum(shares, 1e-3)), generator.uniform(0.05, 1.2, 2)])
        out.append(np.asarray(np.linalg.pinv(problem.basis) @ theta, dtype=np.float64))
    return out


def _lbfgs(problem: Problem, start: FloatArray, delta: float) -> tuple[float, FloatArray]:
    bounds = [(-LN_RANGE, LN_RANGE)] * 3 + [EXPONENT_RANGE] * (len(start) - 3)
    end = minimize(
        lambda free: value_and_gradient(problem, free, delta), start, jac=True, method="L-BFGS-B", bounds=bounds,
        options={"maxiter": 5000, "maxfun": 5000, "ftol": 1e-14, "gtol": 1e-10, "maxcor": 30},
    )  # fmt: skip
    return float(end.fun), problem.basis @ end.x
