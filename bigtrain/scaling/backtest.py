"""Fits of the smaller runs that predict the larger ones: at several factors of FLOPs, and what they say of misfit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bigtrain.scaling import law
from bigtrain.scaling.bootstrap import bootstrap, interval
from bigtrain.scaling.envelope import hull
from bigtrain.scaling.law import FloatArray
from bigtrain.scaling.lines import line
from bigtrain.scaling.objective import Problem
from bigtrain.scaling.parametric import fit as fit_parametric
from bigtrain.scaling.runs.table import RunTable

HELD_OUT_FACTOR = 3.0
"""Runs above a third of the largest run's FLOPs are held out for the headline number."""
FACTORS = (HELD_OUT_FACTOR, 10.0, 30.0)
"""Extrapolation factors of the back-tests."""
REPLICATES = 200


@dataclass(frozen=True)
class Prediction:
    """What a fit of some runs says of all n runs of a table."""

    loss: FloatArray
    """Shape (n,)."""
    replicates: FloatArray
    """Shape (R, n)."""
    residuals: FloatArray
    """Of the fitted runs: ln predicted - ln measured."""
    parameters: int


Predictor = Callable[[RunTable, npt.NDArray[np.int64]], Prediction]
"""Fits those runs, of those clusters, and predicts all runs."""


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


def parametric_predictor(problem: Problem, table: RunTable, seed: int) -> Predictor:
    """Approach 3 as the back-tests use it, by the function and delta of a problem."""

    def predict(small: RunTable, clusters: npt.NDArray[np.int64]) -> Prediction:
        reduced = Problem.of(
            small.params, small.tokens, small.loss, problem.function, problem.delta, problem.equal_exponents
        )
        fitted = fit_parametric(reduced, seed, starts=4)
        refits = bootstrap(reduced, fitted.centred, clusters, seed, REPLICATES)
        return Prediction(
            law.loss(fitted.theta, table.params, table.tokens),
            law.loss(refits.theta[:, None], table.params, table.tokens), fitted.residuals, problem.basis.shape[1],
        )  # fmt: skip

    return predict


def held_out(
    table: RunTable, clusters: npt.NDArray[np.int64], seed: int, factor: float, predictor: Predictor, parameters: int
) -> HeldOut | str:
    """Fit the runs up to 1/factor of the largest one's FLOPs and predict the rest; or why that is not possible.

    Args:
        table: All runs.
        clusters: Of each run.
        seed: Of the noise in the intervals.
        factor: Of FLOPs.
        predictor: The fit.
        parameters: How many it has.
    """
    last = int(np.argmax(table.flops))
    few = table.flops <= table.flops[last] / factor
    small = table.take(few)
    sizes = len(set(small.group))
    if len(small) <= parameters or sizes < 3 or len(np.unique(small.tokens)) < 3:
        return f"{len(small)} runs of {sizes} models lie below 1/{factor:g} of the largest run's FLOPs: too few to fit"
    found = predictor(small, np.unique(clusters[few], return_inverse=True)[1].astype(np.int64))
    predicted = found.loss
    measured, rest = table.loss, ~few
    x, y = np.log(small.flops), np.log(small.loss)
    rows = hull(x, y)
    slope, intercept = line(x[rows], y[rows]) if len(rows) > 1 else (0.0, float(y.min()))
    power = float(np.exp(slope * np.log(table.flops[last]) + intercept))
    near = np.argmin(np.log(small.params / table.params[last]) ** 2 + np.log(small.tokens / table.tokens[last]) ** 2)
    largest = float(small.flops.max())
    outside = [
        _beyond(float(measured[row]), float(predicted[row]), _prediction_interval(found, int(row), seed))
        for row in np.flatnonzero(rest)
    ]
    return HeldOut(
        fitted=len(small), held_out=int(rest.sum()), row=last, predicted=float(predicted[last]),
        prediction_interval=_prediction_interval(found, last, seed), measured=float(measured[last]),
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


def _prediction_interval(found: Prediction, row: int, seed: int) -> list[float]:
    sampled = np.random.default_rng((seed, 2)).choice(found.residuals, len(found.replicates))
    # Small samples fit their own noise: residuals are too short by sqrt((n - p) / n).
    count = len(found.residuals)
    scale = np.sqrt(count / max(count - found.parameters, 1))
    return interval(found.replicates[:, row] * np.exp(sampled * scale))
