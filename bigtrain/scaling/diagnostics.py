"""Diagnostics of a parametric fit: sensitivity to delta, influence of each cluster, outliers, trends of residuals."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bigtrain.scaling import law
from bigtrain.scaling.batched import descend, refit, robust_weights
from bigtrain.scaling.law import FloatArray
from bigtrain.scaling.objective import Problem
from bigtrain.scaling.parametric import ParametricFit
from bigtrain.scaling.runs.table import RunTable

DELTAS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1)
OUTLIER = 5.0
"""A run is an outlier if its residual is larger than so many robust standard deviations."""
TREND = 3.0
"""A slope of the residuals is reported if it is larger than so many standard errors."""
_NEIGHBOURS = 24
"""Number of runs with the nearest FLOPs from which the noise at a run is estimated."""
_MAD = 1.4826


def noise(residuals: FloatArray) -> float:
    """Robust standard deviation of log residuals of shape (n,), from their median absolute deviation."""
    return float(_MAD * np.median(np.abs(residuals - np.median(residuals))))


def local_noise(table: RunTable, residuals: FloatArray) -> FloatArray:
    """Noise at each run, shape (n,): the larger of the noise of all runs and that of runs with similar FLOPs."""
    overall = noise(residuals)
    count = len(residuals)
    if count <= _NEIGHBOURS:
        return np.full(count, overall)
    order = np.argsort(table.flops, kind="stable")
    out = np.empty(count)
    for place, row in enumerate(order.tolist()):
        low = min(max(place - _NEIGHBOURS // 2, 0), count - _NEIGHBOURS)
        out[row] = max(overall, noise(residuals[order[low : low + _NEIGHBOURS]]))
    return out


def delta_sensitivity(fitted: ParametricFit, target: float) -> list[dict[str, float]]:
    """The law's parameters and the loss at the target, refitted with each delta of the Huber loss in `DELTAS`."""
    problem = fitted.problem
    found = []
    for delta in DELTAS:
        other = Problem(
            problem.ln_n, problem.ln_d, problem.ln_loss, problem.center, "huber", delta, problem.equal_exponents
        )
        theta = other.uncentred(descend(other, np.ones((1, len(problem.ln_n))), fitted.centred[None])[0])[0]
        found.append({
            "delta": delta, **dict(zip(law.NAMES, law.natural(theta).tolist(), strict=True)),
            "target_loss": float(law.optimal_loss(theta, target)),
        })  # fmt: skip
    return found


def influence(fitted: ParametricFit, clusters: npt.NDArray[np.int64], target: float) -> FloatArray:
    """Change of the loss at the target if a cluster is excluded, for each cluster; shape (clusters,)."""
    weights = np.array([clusters != c for c in range(int(clusters.max()) + 1)], dtype=np.float64)
    ends = refit(fitted.problem, weights, fitted.centred, robust_weights(fitted.problem, fitted.centred))
    without = law.optimal_loss(fitted.problem.uncentred(ends.theta), target)
    return np.asarray(without - law.optimal_loss(fitted.theta, target), dtype=np.float64)


def outliers(table: RunTable, fitted: ParametricFit, target: float) -> dict[str, Any]:
    """The runs far from the law, and the parameters of the law without them."""
    size = np.abs(fitted.residuals) / np.maximum(local_noise(table, fitted.residuals), 1e-12)
    rows = np.flatnonzero((size > OUTLIER) & (np.abs(fitted.residuals) > 1e-6))
    found: dict[str, Any] = {
        "rule": f"|ln predicted - ln measured| above {OUTLIER:g} robust standard deviations, of all runs and of those "
        "of like FLOPs",
        "runs": [{"run": table.run[i], "place": table.place[i], "residual": float(fitted.residuals[i])} for i in rows],
    }
    if len(rows):
        weights = np.ones((1, len(table)))
        weights[0, rows] = 0.0
        theta = fitted.problem.uncentred(refit(fitted.problem, weights, fitted.centred).theta)[0]
        found["without"] = {
            **dict(zip(law.NAMES, law.natural(theta).tolist(), strict=True)),
            "target_loss": float(law.optimal_loss(theta, target)),
        }
    return found


def trends(table: RunTable, residuals: FloatArray) -> dict[str, dict[str, float]]:
    """Slopes of the log residuals against ln N, ln D and ln D/N, each also in units of its standard error."""
    found = {}
    clipped = np.clip(residuals, *np.quantile(residuals, [0.01, 0.99]))
    for name, column in (
        ("params", table.params), ("tokens", table.tokens), ("tokens_per_param", table.tokens / table.params)
    ):  # fmt: skip
        x = np.log(column) - np.log(column).mean()
        slope = float(x @ clipped / (x @ x))
        rest = clipped - clipped.mean() - slope * x
        error = float(np.sqrt(rest @ rest / max(len(x) - 2, 1) / (x @ x)))
        found[name] = {"slope": slope, "standard_errors": slope / error if error > 0 else 0.0}
    return found
