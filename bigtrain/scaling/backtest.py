"""Back-tests: fits to the smaller runs that predict the larger ones, at several factors of FLOPs, and their misfit."""

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
"""Runs above a third of the largest run's FLOPs are held out for the main reported error."""
FACTORS = (HELD_OUT_FACTOR, 10.0, 30.0)
"""Factors of FLOPs over which the back-tests extrapolate."""
REPLICATES = 200


@dataclass(frozen=True)
class Prediction:
    """The prediction of all n runs of a table by a fit to some of them."""

    loss: FloatArray
    """Predicted losses, shape (n,)."""
    replicates: FloatArray
    """Predicted losses of the bootstrap replicates, shape (R, n)."""
    residuals: FloatArray
    """ln predicted - ln measured of each fitted run."""
    parameters: int
    """Number of fitted parameters."""


Predictor = Callable[[RunTable, npt.NDArray[np.int64]], Prediction]
"""A function that fits the runs of a table, given their clusters, and predicts all runs."""


@dataclass(frozen=True)
class HeldOut:
    """The errors of one back-test: of the predictions for the held-out runs, above all for the largest one."""

    fitted: int
    """Number of fitted runs."""
    held_out: int
    """Number of held-out runs."""
    row: int
    """Index of the run with the most FLOPs."""
    predicted: float
    """Predicted loss of that run."""
    prediction_interval: list[float]
    """95 % interval of the predicted loss, with the uncertainty of the law and the noise of one run."""
    measured: float
    """Measured loss of that run."""
    error: float
    """Relative error, predicted / measured - 1."""
    factor: float
    """FLOPs of that run divided by those of the largest fitted run."""
    mean_absolute_error: float
    """Mean absolute relative error of all held-out runs."""
    nearest_run_error: float
    """Relative error of a baseline: the loss of the fitted run that is nearest in (ln N, ln D)."""
    power_law_error: float
    """Relative error of a baseline: a power law in FLOPs alone, through the frontier of the fitted runs."""
    misfit: float
    """Root mean square of the held-out runs' log errors beyond their intervals; 0 if all losses are inside."""

    @property
    def left_interval(self) -> bool:
        """Whether the measured loss of the largest run lies outside its interval."""
        low, high = self.prediction_interval
        return not low <= self.measured <= high


def parametric_predictor(problem: Problem, table: RunTable, seed: int) -> Predictor:
    """The predictor of approach 3, with the loss function and delta of a problem.

    Args:
        problem: The problem of all runs.
        table: All runs, which are predicted.
        seed: Seed of the starts and of the bootstrap.
    """

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
    """Fit the runs up to 1/factor of the largest run's FLOPs and predict the others.

    Args:
        table: All runs.
        clusters: Cluster of each run, shape (n,).
        seed: Seed of the noise in the intervals.
        factor: Ratio of the largest run's FLOPs to the limit of the fitted runs.
        predictor: The fit.
        parameters: Number of parameters of the fit.

    Returns:
        The errors, or the reason why too few runs can be fitted.
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
    """The squared log error minus the squared half-width of its interval on that side; 0 inside the interval."""
    error = math.log(measured / predicted)
    half = math.log((ends[1] if error > 0 else ends[0]) / predicted)
    return max(0.0, error**2 - half**2)


def _prediction_interval(found: Prediction, row: int, seed: int) -> list[float]:
    sampled = np.random.default_rng((seed, 2)).choice(found.residuals, len(found.replicates))
    # A fit of p parameters to n runs makes the residuals too small by a factor sqrt((n - p) / n).
    count = len(found.residuals)
    scale = np.sqrt(count / max(count - found.parameters, 1))
    return interval(found.replicates[:, row] * np.exp(sampled * scale))
