"""What a fit should be asked before it is believed: delta, influence, outliers, trends, the largest runs left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bigtrain.scaling import law
from bigtrain.scaling.batched import descend, refit, robust_weights
from bigtrain.scaling.bootstrap import Replicates, bootstrap, interval
from bigtrain.scaling.envelope import hull
from bigtrain.scaling.law import FloatArray
from bigtrain.scaling.lines import line
from bigtrain.scaling.objective import Problem
from bigtrain.scaling.parametric import ParametricFit
from bigtrain.scaling.parametric import fit as fit_parametric
from bigtrain.scaling.table import RunTable

DELTAS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1)
OUTLIER = 5.0
"""Robust standard deviations of the residual beyond which a run is named."""
TREND = 3.0
"""Standard errors beyond which a slope of the residuals is named."""
HELD_OUT_FACTOR = 3.0
"""Runs above a third of the largest run's FLOPs are held out."""
_MAD = 1.4826


def noise(residuals: FloatArray) -> float:
    """Robust standard deviation of the log residuals."""
    return float(_MAD * np.median(np.abs(residuals - np.median(residuals))))


def delta_sensitivity(fitted: ParametricFit, target: float) -> list[dict[str, float]]:
    """Parameters and the loss at the target for other deltas of Huber's function."""
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
    """By how much the loss at the target changes without each cluster, shape (clusters,)."""
    weights = np.array([clusters != c for c in range(int(clusters.max()) + 1)], dtype=np.float64)
    ends = refit(fitted.problem, weights, fitted.centred, robust_weights(fitted.problem, fitted.centred))
    without = law.optimal_loss(fitted.problem.uncentred(ends.theta), target)
    return np.asarray(without - law.optimal_loss(fitted.theta, target), dtype=np.float64)


def outliers(table: RunTable, fitted: ParametricFit, target: float) -> dict[str, Any]:
    """Runs far from the law, and what leaving them out changes."""
    size = np.abs(fitted.residuals) / max(noise(fitted.residuals), 1e-12)
    rows = np.flatnonzero((size > OUTLIER) & (np.abs(fitted.residuals) > 1e-6))
    found: dict[str, Any] = {
        "rule": f"|ln predicted - ln measured| above {OUTLIER:g} robust standard deviations",
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
    """Slopes of the log residuals against N, D and D/N, with their size in standard errors."""
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


@dataclass(frozen=True)
class HeldOut:
    """How well the law of the smaller runs predicts the largest."""

    fitted: int
    held_out: int
    row: int
    """The run of the most FLOPs, in the table."""
    predicted: float
    prediction_interval: list[float]
    """95 %: the law's own uncertainty and the noise of one run."""
    measured: float
    error: float
    """predicted / measured - 1."""
    factor: float
    """FLOPs of that run over those of the largest fitted one."""
    mean_absolute_error: float
    """Relative, over all runs held out."""
    nearest_run_error: float
    """That of taking the loss of the nearest fitted run in (ln N, ln D)."""
    power_law_error: float
    """That of a power law in FLOPs alone, through the frontier of the fitted runs."""


def held_out(
    table: RunTable, problem: Problem, clusters: npt.NDArray[np.int64], seed: int, replicates: int
) -> HeldOut | str:
    """Fit the runs up to a third of the largest one's FLOPs, predict the rest; or why that cannot be done."""
    last = int(np.argmax(table.flops))
    few = table.flops <= table.flops[last] / HELD_OUT_FACTOR
    small = table.take(few)
    parameters = problem.basis.shape[1]
    sizes = len(set(small.group))
    if len(small) <= parameters or sizes < 3 or len(np.unique(small.tokens)) < 3:
        return f"{len(small)} runs of {sizes} models lie below a third of the largest run's FLOPs: too few to fit"
    reduced = Problem.of(
        small.params, small.tokens, small.loss, problem.function, problem.delta, problem.equal_exponents
    )
    fitted = fit_parametric(reduced, seed, starts=8)
    members = np.unique(clusters[few], return_inverse=True)[1].astype(np.int64)
    refits = bootstrap(reduced, fitted.centred, members, seed, replicates)
    predicted = law.loss(fitted.theta, table.params, table.tokens)
    measured, rest = table.loss, ~few
    x, y = np.log(small.flops), np.log(small.loss)
    rows = hull(x, y)
    slope, intercept = line(x[rows], y[rows]) if len(rows) > 1 else (0.0, float(y.min()))
    power = float(np.exp(slope * np.log(table.flops[last]) + intercept))
    near = np.argmin(np.log(small.params / table.params[last]) ** 2 + np.log(small.tokens / table.tokens[last]) ** 2)
    largest = float(small.flops.max())
    return HeldOut(
        fitted=len(small), held_out=int(rest.sum()), row=last, predicted=float(predicted[last]),
        prediction_interval=_prediction_interval(refits, fitted, table, last, seed), measured=float(measured[last]),
        error=float(predicted[last] / measured[last] - 1), factor=float(table.flops[last] / largest),
        mean_absolute_error=float(np.mean(np.abs(predicted[rest] / measured[rest] - 1))),
        nearest_run_error=float(small.loss[near] / measured[last] - 1), power_law_error=power / measured[last] - 1,
    )  # fmt: skip


def _prediction_interval(
    refits: Replicates, fitted: ParametricFit, table: RunTable, row: int, seed: int
) -> list[float]:
    drawn = np.random.default_rng((seed, 2)).choice(fitted.residuals, len(refits.theta))
    # Small samples fit their own noise: residuals are too short by sqrt((n - p) / n).
    count, parameters = len(fitted.residuals), fitted.problem.basis.shape[1]
    scale = np.sqrt(count / max(count - parameters, 1))
    return interval(law.loss(refits.theta, table.params[row], table.tokens[row]) * np.exp(drawn * scale))
