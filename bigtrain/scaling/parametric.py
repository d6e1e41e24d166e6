"""Approach 3: the law fitted to all runs, by a search from many starts and by variable projection."""

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
    """The fitted parameters, with diagnostics of the search."""

    problem: Problem
    centred: FloatArray
    """Parameters for centred N and D, shape (5,)."""
    theta: FloatArray
    """Parameters (ln A, ln B, ln E, alpha, beta) for N and D, shape (5,)."""
    objective: float
    """Objective at the minimum: the sum of the Huber loss, of |residual|, or of squared residuals."""
    starts: int
    """Number of random starts."""
    converged_starts: float
    """Fraction of the starts from which L-BFGS reached the minimum."""
    projection_objective: float
    """Objective that variable projection reached, which needs no start."""
    condition_number: float
    """Condition number of the Jacobian with columns of unit length; large if parameters are not identifiable."""
    residuals: FloatArray
    """ln predicted - ln measured of each run, shape (n,)."""


def fit(problem: Problem, seed: int = 0, starts: int = STARTS) -> ParametricFit:
    """Fit the law's parameters.

    L-BFGS from many starts and variable projection search independently. Each continues with Newton's method, and the
    lower of the two minima is the result.

    Args:
        problem: The runs and the objective.
        seed: Seed of the random starts.
        starts: Number of random starts; 0: variable projection only.
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
    """ln predicted - ln measured of each run, shape (n,), for centred parameters of shape (5,)."""
    at = terms(problem, theta[None])
    if problem.function == "squares":
        return np.asarray(np.log1p(at.residual[0] / np.exp(problem.ln_loss)), dtype=np.float64)
    return at.residual[0]


def condition_number(problem: Problem, theta: FloatArray) -> float:
    """Condition number of the Jacobian of ln L in the free parameters, with columns scaled to unit length."""
    jacobian = log_jacobian(theta, problem.ln_n, problem.ln_d) @ problem.basis
    return float(np.linalg.cond(jacobian / np.linalg.norm(jacobian, axis=0)))


def log_jacobian(theta: FloatArray, ln_n: FloatArray, ln_d: FloatArray) -> FloatArray:
    """Derivatives of ln L by the five parameters, shape (n, 5).

    Args:
        theta: Parameters, shape (5,), centred if and only if `ln_n` and `ln_d` are.
        ln_n: ln N of the runs, shape (n,).
        ln_d: ln D of the runs, shape (n,).
    """
    parts = np.exp([theta[0] - theta[3] * ln_n, theta[1] - theta[4] * ln_d, np.full_like(ln_n, theta[2])])
    share = parts / parts.sum(axis=0)
    return np.column_stack([share[0], share[1], share[2], -share[0] * ln_n, -share[1] * ln_d])


def _starts(problem: Problem, seed: int, count: int) -> list[FloatArray]:
    """Random starts, as centred free parameters: exponents over the published range, and random shares of the loss."""
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
