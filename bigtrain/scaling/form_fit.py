"""The fit of the user's own form: the Huber loss of log residuals, minimised from many starts, with the same bootstrap.

Constants in which the form is linear are computed from the others by non-negative least squares, so that only the
others need a starting value (variable projection). Each start and each refit then ends with damped Gauss-Newton in the
logarithms of all constants.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from bigtrain.config import UserError
from bigtrain.scaling.approaches import Result, deviation, with_interval
from bigtrain.scaling.backtest import Prediction
from bigtrain.scaling.bootstrap import CHUNK, draw_weights, interval
from bigtrain.scaling.diagnostics import noise
from bigtrain.scaling.document import pack
from bigtrain.scaling.forms import Form
from bigtrain.scaling.law import FloatArray
from bigtrain.scaling.objective import DEFAULT_DELTA
from bigtrain.scaling.options import FitOptions
from bigtrain.scaling.runs.table import RunTable

STARTS = 64
MAX_STEPS = 300
_RANGE = 60.0
"""Largest absolute value of the logarithm of a constant."""
_SAME = 1e-6
_STEP = 1.05
"""Factor of FLOPs between the two points from which the exponent of N* at the target is computed."""


@dataclass(frozen=True)
class FormFit:
    """A form's fitted constants, with diagnostics of the search."""

    form: Form
    logs: FloatArray
    """Logarithms of the constants, shape (k,)."""
    objective: float
    """Sum of the Huber loss over the log residuals, in the scale in which approach 3 reports it."""
    converged_starts: float
    """Fraction of the starts that reached the minimum."""
    condition_number: float
    """Condition number of the Jacobian with columns of unit length; large if constants are not identifiable."""
    residuals: FloatArray
    """ln predicted - ln measured of each run, shape (n,)."""


def data_of(form: Form, table: RunTable) -> dict[str, FloatArray]:
    """The values of a form's variables, by name, each of shape (n,).

    Raises:
        UserError: The form has U, and a row of the table has no unique tokens.
    """
    if not form.needs_unique:
        return {"N": table.params, "D": table.tokens}
    if table.unique_tokens is None or not (table.unique_tokens > 0).all():
        raise UserError(
            "The form has U, but the table has no column of unique tokens with a value in every row", table.source,
            "Name the column unique_tokens: the tokens of the data set that a run repeats.",
        )  # fmt: skip
    return {"N": table.params, "D": table.tokens, "U": np.minimum(table.unique_tokens, table.tokens)}


def fit_form(form: Form, table: RunTable, delta: float = DEFAULT_DELTA, seed: int = 0, starts: int = STARTS) -> FormFit:
    """Fit the constants of a form to the runs of a table.

    Args:
        form: The form.
        table: The runs.
        delta: Delta of the Huber loss.
        seed: Seed of the random starts.
        starts: Number of starts.

    Raises:
        UserError: There are not more runs than constants, the table lacks a variable of the form, or the form is not
            finite from any start.
    """
    if len(table) <= len(form.constants):
        raise UserError(
            f"{len(table)} runs cannot give the form's {len(form.constants)} constants", table.source, "Fit more runs."
        )
    data, losses = data_of(form, table), table.loss
    begins = _starts(form, data, losses, seed, starts)
    weights = np.ones((len(begins), len(losses)))
    # A large delta first: with a small delta alone, starts far from the minimum converge too slowly.
    ends, _ = _descend(form, data, losses, weights, begins, max(delta, 0.03))
    ends, reached = _descend(form, data, losses, weights, ends, delta)
    best = int(np.argmin(reached))
    if not math.isfinite(reached[best]):
        raise UserError(f"The form {form.text!r} is not finite on these runs", table.source, "Check its expression.")
    logs = ends[best]
    value, slope = form.value(logs[None], data)
    jacobian = (slope[:, 0] / value[0]).T
    norms = np.linalg.norm(jacobian, axis=0)
    return FormFit(
        form, logs, float(reached[best] * delta), float(np.mean(reached <= reached[best] * (1 + 100 * _SAME))),
        float(np.linalg.cond(jacobian / np.where(norms > 0, norms, 1.0))) if (norms > 0).all() else math.inf,
        np.log(value[0]) - np.log(losses),
    )  # fmt: skip


def refit_form(
    fitted: FormFit, table: RunTable, clusters: npt.NDArray[np.int64], delta: float, seed: int, replicates: int
) -> FloatArray:
    """Refit a form to resampled clusters, each time starting from the full fit.

    Args:
        fitted: The full fit.
        table: The runs.
        clusters: Cluster of each run, shape (n,), numbered from 0.
        delta: Delta of the Huber loss.
        seed: Seed of the bootstrap.
        replicates: Number R of replicates.

    Returns:
        Logarithms of the constants, shape (R, k).
    """
    data = data_of(fitted.form, table)
    found = []
    for low in range(0, replicates, CHUNK):
        weights = draw_weights(clusters, seed, np.arange(low, min(low + CHUNK, replicates)))
        begins = np.repeat(fitted.logs[None], len(weights), axis=0)
        found.append(_descend(fitted.form, data, table.loss, weights, begins, delta)[0])
    return np.concatenate(found)


def form_result(
    form: Form, table: RunTable, clusters: npt.NDArray[np.int64], target: float, options: FitOptions
) -> tuple[Result, FloatArray]:
    """Fit a form; returns its part of law.json, and its residuals of shape (n,).

    Raises:
        UserError: `fit_form` fails, or the form has no optimal N at the target.
    """
    fitted = fit_form(form, table, options.delta, options.seed)
    many = refit_form(fitted, table, clusters, options.delta, options.seed, options.replicates)
    unique = float(table.unique_tokens.max()) if form.needs_unique and table.unique_tokens is not None else math.inf
    both = np.concatenate([fitted.logs[None], many])
    n, d, loss = form.optimum(both, target, unique)
    beside = form.optimum(both, target * _STEP, unique)[0]
    with np.errstate(all="ignore"):
        a = np.log(beside / n) / math.log(_STEP)
    own = np.exp(fitted.logs)
    constants = dict(zip(form.constants, own.tolist(), strict=True))
    result: dict[str, Any] = {
        "expression": form.text, "constants": constants, "ln_constants": fitted.logs.tolist(),
        "unique_tokens": unique if form.needs_unique else None, "a": float(a[0]), "b": 1 - float(a[0]),
        "objective": fitted.objective, "delta": options.delta,
        "interval": {**{name: interval(np.exp(many[:, i])) for i, name in enumerate(form.constants)},
                     "a": interval(a[1:])},
        "standard_error": {**{name: deviation(np.exp(many[:, i])) for i, name in enumerate(form.constants)},
                           "a": deviation(a[1:])},
        "noise": noise(fitted.residuals),
        "search": {"starts": STARTS, "converged_starts": fitted.converged_starts,
                   "condition_number": fitted.condition_number},
        "replicates": pack(many),
    }  # fmt: skip
    if np.isfinite(n[0]):
        result["target"] = {
            "flops": target, "params": with_interval(float(n[0]), n[1:]), "tokens": with_interval(float(d[0]), d[1:]),
            "tokens_per_param": with_interval(float(d[0] / n[0]), d[1:] / n[1:]),
            "loss": with_interval(float(loss[0]), loss[1:]),
        }  # fmt: skip
    else:
        raise UserError(
            f"By the form {form.text!r} no N is best at {target:.3g} FLOPs: the loss falls to the end of all N tried",
            table.source, "Check that both N and D lower the loss, add runs, or use a simpler form.",
        )  # fmt: skip
    return Result(result), fitted.residuals


def predict_rest(
    form: Form, delta: float, small: RunTable, clusters: npt.NDArray[np.int64], rest: RunTable, seed: int, count: int
) -> Prediction:
    """Fit a form to some runs and predict others, for a back-test.

    Args:
        form: The form.
        delta: Delta of the Huber loss.
        small: The runs to fit.
        clusters: Cluster of each of these runs, numbered from 0.
        rest: The runs to predict.
        seed: Seed of the starts and of the bootstrap.
        count: Number of bootstrap replicates.
    """
    fitted = fit_form(form, small, delta, seed, starts=STARTS // 2)
    many = refit_form(fitted, small, clusters, delta, seed, count)
    unique = rest.unique_tokens if form.needs_unique and rest.unique_tokens is not None else math.inf
    return Prediction(
        form.loss(fitted.logs, rest.params, rest.tokens, unique)[0], form.loss(many, rest.params, rest.tokens, unique),
        fitted.residuals, len(form.constants),
    )  # fmt: skip


def _starts(form: Form, data: dict[str, FloatArray], losses: FloatArray, seed: int, count: int) -> FloatArray:
    """Logarithms of the constants to start from, shape (count, k)."""
    generator = np.random.default_rng((seed, 3))
    linear = _linear_constants(form, data, generator)
    largest = math.log(max(float(column.max()) for column in data.values()))
    begins = np.empty((count, len(form.constants)))
    for i, name in enumerate(form.constants):
        if name in form.exponents:
            begins[:, i] = generator.uniform(math.log(0.05), math.log(1.5), count)
        else:
            # A constant that is compared with N or D may be as large as they are; one that is compared with a ratio
            # of them is of order 1. Half of the starts assume the one, half the other.
            begins[:, i] = np.where(
                np.arange(count) % 2 == 0, generator.uniform(-1.0, 4.0, count), generator.uniform(0.0, largest, count)
            )
    if not linear:
        return begins
    # f = f0 + sum c_i (f_i - f0): in f_i the linear constant i is 1 and the other linear constants are almost 0.
    columns = [form.constants.index(name) for name in linear]
    at = np.repeat(begins[:, None], len(columns) + 1, axis=1)
    at[:, :, columns] = -_RANGE
    for place, column in enumerate(columns, 1):
        at[:, place, column] = 0.0
    values = form.value(at.reshape(-1, begins.shape[1]), data)[0].reshape(count, len(columns) + 1, -1)
    for row in range(count):
        base, parts = values[row, 0], (values[row, 1:] - values[row, 0]).T / losses[:, None]
        scale = np.abs(parts).max(axis=0)
        if not (np.isfinite(parts).all() and np.isfinite(base).all() and (scale > 0).all()):
            continue
        found = nnls(parts / scale, 1 - base / losses)[0] / scale
        begins[row, columns] = np.log(np.maximum(found, 1e-4 / scale))
    return np.clip(begins, -_RANGE, _RANGE)


def _linear_constants(form: Form, data: dict[str, FloatArray], generator: np.random.Generator) -> list[str]:
    """Constants in which the form is jointly linear, found by finite differences at a random point."""
    few = {name: column[: min(len(column), 5)] for name, column in data.items()}
    point = generator.uniform(0.3, 0.9, len(form.constants))
    found: list[int] = []

    def values(*changed: tuple[int, float]) -> FloatArray:
        at = point.copy()
        for i, factor in changed:
            at[i] *= factor
        return form.value(np.log(at)[None], few)[0][0]

    for i, name in enumerate(form.constants):
        if name in form.exponents:
            continue
        ends = values((i, 1.0)), values((i, 2.0)), values((i, 3.0))
        same = [(ends[2] - ends[1], ends[1] - ends[0])]
        same += [(values((i, 2.0), (j, 2.0)) - values((j, 2.0)), ends[1] - ends[0]) for j in found]
        size = np.abs(ends[1] - ends[0]) + 1e-12 * np.abs(ends[0])
        if all(np.isfinite(a).all() and (np.abs(a - b) <= 1e-6 * size + 1e-14 * np.abs(ends[0])).all()
               for a, b in same):  # fmt: skip
            found.append(i)
    return [form.constants[i] for i in found]


def _descend(
    form: Form, data: dict[str, FloatArray], losses: FloatArray, weights: FloatArray, begins: FloatArray, delta: float
) -> tuple[FloatArray, FloatArray]:
    """Damped Gauss-Newton from R starts.

    Returns:
        Logarithms of the constants, shape (R, k), and weighted sums of the Huber loss divided by delta, shape (R,);
        infinite where the form is not finite.
    """
    logs = np.array(begins)
    ln_loss = np.log(losses)

    def residual(at: FloatArray) -> tuple[FloatArray, FloatArray]:
        value, slope = form.value(at, data)
        with np.errstate(all="ignore"):
            return np.log(value) - ln_loss, slope / value

    def total(rest: FloatArray, w: FloatArray) -> FloatArray:
        size = np.abs(rest)
        with np.errstate(all="ignore"):
            cost = (w * np.where(size <= delta, 0.5 * size**2 / delta, size - 0.5 * delta)).sum(axis=1)
        return np.where(np.isfinite(cost), cost, np.inf)

    rest, slope = residual(logs)
    objective = total(rest, weights)
    damping = np.full(len(logs), 1e-2)
    active = np.flatnonzero(np.isfinite(objective))
    rest, slope = rest[active], slope[:, active]
    for _ in range(MAX_STEPS):
        if not len(active):
            break
        w = weights[active]
        pull = w / np.maximum(np.abs(rest), delta)
        gradient = np.einsum("krn,rn->rk", slope, pull * rest)
        hessian = np.einsum("krn,rn,lrn->rkl", slope, pull, slope)
        scale = np.einsum("rkk->rk", hessian)
        system = hessian + (damping[active, None] * scale + 1e-12 * scale.max(axis=1, keepdims=True) + 1e-300)[
            :, :, None
        ] * np.eye(logs.shape[1])
        step = -np.linalg.solve(system, gradient[..., None])[..., 0]
        trial = np.clip(logs[active] + np.clip(step, -3.0, 3.0), -_RANGE, _RANGE)
        new_rest, new_slope = residual(trial)
        reached = total(new_rest, w)
        better = reached < objective[active]
        gained = objective[active] - reached
        rest, slope = np.where(better[:, None], new_rest, rest), np.where(better[None, :, None], new_slope, slope)
        done = (better & (gained <= 1e-9 * objective[active])) | (~better & (damping[active] > 1e8))
        logs[active[better]], objective[active[better]] = trial[better], reached[better]
        damping[active] = np.where(better, damping[active] * 0.3, damping[active] * 4.0)
        rest, slope, active = rest[~done], slope[:, ~done], active[~done]
    return logs, objective
