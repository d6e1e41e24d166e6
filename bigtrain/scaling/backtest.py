"""Fits of the smaller runs that predict the larger ones: at several factors of FLOPs, and what they say of misfit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bigtrain.scaling import law
from bigtrain.scaling.bootstrap import Replicates, bootstrap, interval
from bigtrain.scaling.envelope import hull
from bigtrain.scaling.lines import line
from bigtrain.scaling.objective import Problem
from bigtrain.scaling.parametric import ParametricFit
from bigtrain.scaling.parametric import fit as fit_parametric
from bigtrain.scaling.runs.table import RunTable

HELD_OUT_FACTOR = 3.0
"""Runs above a third of the largest run's FLOPs are held out for the headline number."""
FACTORS = (HELD_OUT_FACTOR, 10.0, 30.0)
"""Extrapolation factors of the back-tests."""
REPLICATES = 200


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
    """Of taking the loss of the nearest fitted run in (ln N, ln D)."""
    power_law_error: float
    """Of a power law in FLOPs alone, through the frontier of the fitted runs."""
    misfit: float
    """Root mean square of the log errors beyond the half-widths of their intervals; 0 where the intervals hold."""

    @property
    def left_interval(self) -> bool:
        """Whether the largest run lies outside its interval."""
        low, high = self.prediction_interval
        return not low <= self.measured <= high


def held_out(
    table: RunTable, problem: Problem, clusters: npt.NDArray[np.int64], seed: int, factor: float = HELD_OUT_FACTOR
) -> HeldOut | str:
    """Fit the runs up to 1/factor of the largest one's FLOPs and predict the rest; or why that is not possible."""
    last = int(np.argmax(table.flops))
    few = table.flops <= table.flops[last] / factor
    small = table.take(few)
    parameters = problem.basis.shape[1]
    sizes = len(set(small.group))
    if len(small) <= parameters or sizes < 3 or len(np.unique(small.tokens)) < 3:
        return f"{len(small)} runs of {sizes} models lie below 1/{factor:g} of the largest run's FLOPs: too few to fit"
    reduced = Problem.of(
        small.params, small.tokens, small.loss, problem.function, problem.delta, problem.equal_exponents
    )
    fitted = fit_parametric(reduced, seed, starts=4)
    members = np.unique(clusters[few], return_inverse=True)[1].astype(np.int64)
    refits = bootstrap(reduced, fitted.centred, members, seed, REPLICATES)
    predicted = law.loss(fitted.theta, table.params, table.tokens)
    measured, rest = table.loss, ~few
    x, y = np.log(small.flops), np.log(small.loss)
    rows = hull(x, y)
    slope, intercept = line(x[rows], y[rows]) if len(rows) > 1 else (0.0, float(y.min()))
    power = float(np.exp(slope * np.log(table.flops[last]) + intercept))
    near = np.argmin(np.log(small.params / table.params[last]) ** 2 + np.log(small.tokens / table.tokens[last]) ** 2)
    largest = float(small.flops.max())
    outside = [
        _beyond(
            float(measured[row]), float(predicted[row]), _prediction_interval(refits, fitted, table, int(row), seed)
        )
        for row in np.flatnonzero(rest)
    ]
    return HeldOut(
        fitted=len(small), held_out=int(rest.sum()), row=last, predicted=float(predicted[last]),
        prediction_interval=_prediction_interval(refits, fitted, table, last, seed), measured=float(measured[last]),
        error=float(predicted[last] / measured[last] - 1), factor=float(table.flops[last] / largest),
        mean_absolute_error=float(np.mean(np.abs(predicted[rest] / measured[rest] - 1))),
        nearest_run_error=float(small.loss[near] / measured[last] - 1), power_law_error=power / measured[last] - 1,
        misfit=math.sqrt(float(np.mean(outside))),
    )  # fmt: skip


def _beyond(measured: float, predicted: float, ends: list[float]) -> float:
    """The squared log error less the squared half-width of its interval on that side; 0 inside."""
    error = math.log(measured / predicted)
    half = math.log((ends[1] if error > 0 else ends[0]) / predicted)
    return max(0.0, error**2 - half**2)


def _prediction_interval(
    refits: Replicates, fitted: ParametricFit, table: RunTable, row: int, seed: int
) -> list[float]:
    sampled = np.random.default_rng((seed, 2)).choice(fitted.residuals, len(refits.theta))
    # Small samples fit their own noise: residuals are too short by sqrt((n - p) / n).
    count, parameters = len(fitted.residuals), fitted.problem.basis.shape[1]
    scale = np.sqrt(count / max(count - parameters, 1))
    return interval(law.loss(refits.theta, table.params[row], table.tokens[row]) * np.exp(sampled * scale))
