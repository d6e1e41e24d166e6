"""Prediction of a task's accuracy from a ladder of small models, by a chain of two laws (Bhagia et al. 2024).

    1. task loss:  l(N, D) = E + A/N^alpha + B/D^beta, fitted to the mean of the last five checkpoints of each run;
    2. accuracy:   acc(l) = b + a / (1 + exp(-k (l - l0))) with a < 0, fitted to moving averages over five checkpoints
       of each run without its first tenth, and to one additional point: accuracy 1 at loss 0.

The additional point determines the upper end of the accuracy, which the runs of a small ladder do not show. The
interval covers both steps. Each bootstrap replicate resamples the runs and fits both laws, and residuals of both steps
are added. Every second replicate has no additional point, because the data do not support it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from bigtrain.config import UserError
from bigtrain.scaling import law, parametric
from bigtrain.scaling.batched import refit, robust_weights
from bigtrain.scaling.bootstrap import interval
from bigtrain.scaling.document import pack
from bigtrain.scaling.law import FloatArray
from bigtrain.scaling.objective import Problem
from bigtrain.scaling.runs.numbers import parse_number
from bigtrain.scaling.runs.table import RunTable, named_rows, refuse_collinear

AVERAGE = 5
"""Number of checkpoints of a moving average."""
SKIPPED = 0.1
"""Fraction of a run's checkpoints, the first ones, that the second law excludes."""
REPLICATES = 200
_START = (-0.6, 0.9, 3.0, 1.0)
_BOUNDS = ([-1.0, 0.0, 0.0, 0.0], [0.0, np.inf, np.inf, 1.0])
_LAW_PARAMETERS = 5


@dataclass(frozen=True)
class Task:
    """The columns of one task."""

    name: str
    loss: str
    """Name of the column of the task loss, in bits per byte or nats per token."""
    accuracy: str
    """Name of the column of the accuracy, from 0 to 1 or in percent."""


@dataclass(frozen=True)
class Ladder:
    """The checkpoints of r runs for one task."""

    params: FloatArray
    """N of each run, shape (r,)."""
    tokens: FloatArray
    """D at each run's last checkpoint, shape (r,)."""
    loss: FloatArray
    """Mean task loss of each run's last five checkpoints, shape (r,)."""
    smooth_loss: list[FloatArray]
    """For each run, moving averages of the task loss, to which the second law is fitted."""
    smooth_accuracy: list[FloatArray]
    """For each run, moving averages of the accuracy, to which the second law is fitted."""


def sigmoid(parameters: FloatArray, loss: FloatArray | float) -> FloatArray:
    """Accuracy at a task loss l: b + a / (1 + exp(-k (l - l0))) with a < 0.

    Args:
        parameters: (a, l0, k, b), shape (..., 4).
        loss: The task loss, of a shape that broadcasts with the leading axes of `parameters`.
    """
    a, middle, slope, top = (parameters[..., i] for i in range(4))
    with np.errstate(over="ignore"):
        return np.asarray(a / (1 + np.exp(-slope * (loss - middle))) + top, dtype=np.float64)


def guess_tasks(names: Sequence[str]) -> list[Task]:
    """Tasks whose columns are named like TASK_bpb (or _loss) and TASK_accuracy (or _acc), with _, / or . in between."""
    found = []
    for name in names:
        for ending in ("accuracy", "acc", "acc_norm"):
            for mark in "_/.":
                if not name.endswith(f"{mark}{ending}"):
                    continue
                stem = name.removesuffix(f"{mark}{ending}")
                losses = [f"{stem}{mark}{other}" for other in ("bpb", "bits_per_byte", "loss", "ce_loss")]
                loss = next((other for other in losses if other in names), None)
                if loss is not None:
                    found.append(Task(stem, loss, name))
    return found


def ladder(table: RunTable, task: Task) -> Ladder:
    """The ladder of one task, from a table with one row per checkpoint.

    Raises:
        UserError: A column of the task is missing.
    """
    columns = []
    for name in (task.loss, task.accuracy):
        if name not in table.raw:
            raise UserError(f"There is no column '{name}' of the task {task.name}", table.source, "Check --task.")
        columns.append(np.array([_number(value) for value in table.raw[name]]))
    loss, accuracy = columns
    known = np.isfinite(loss) & np.isfinite(accuracy)
    if not known.any():
        raise UserError(
            f"No row has a number in both columns of the task {task.name}, '{task.loss}' and '{task.accuracy}'",
            table.source, "Name the columns: --task NAME=LOSS:ACCURACY",
        )  # fmt: skip
    if (wrong := np.flatnonzero(known & ((accuracy < 0) | (accuracy > 100)))).size:
        raise UserError(
            f"An accuracy must be from 0 to 1, or from 0 to 100 percent; {named_rows(table, wrong, accuracy)}",
            table.source, f"Drop those rows, for example with --where \"'{task.accuracy}' <= 100\"",
        )  # fmt: skip
    if accuracy[known].max() > 1:
        accuracy = accuracy / 100
    params, tokens, ends, smooth_loss, smooth_accuracy = [], [], [], [], []
    names = np.array(table.run)
    for run in dict.fromkeys(table.run):
        rows = np.flatnonzero((names == run) & known)
        rows = rows[np.argsort(table.tokens[rows], kind="stable")]
        if not len(rows):
            continue
        params.append(table.params[rows[-1]])
        tokens.append(table.tokens[rows[-1]])
        ends.append(loss[rows[-AVERAGE:]].mean())
        first = min(int(np.ceil(SKIPPED * len(rows))), len(rows) - 1)
        smooth_loss.append(_average(loss[rows])[first:])
        smooth_accuracy.append(_average(accuracy[rows])[first:])
    return Ladder(np.array(params), np.array(tokens), np.array(ends), smooth_loss, smooth_accuracy)


def _number(value: object) -> float:
    found = parse_number(value.strip().removesuffix("%") if isinstance(value, str) else value)
    return float("nan") if found is None else found


def _average(values: FloatArray) -> FloatArray:
    """Moving averages: the mean of each value and up to four values before it."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    low = np.maximum(np.arange(len(values)) - AVERAGE + 1, 0)
    return np.asarray((sums[1:] - sums[low]) / (np.arange(len(values)) - low + 1), dtype=np.float64)


def fit_task(table: RunTable, task: Task, params: float, tokens: float, seed: int = 0) -> dict[str, Any]:
    """Fit both laws of a task, and predict the accuracy at (N, D) with an interval that covers both.

    Args:
        table: A table with one row per checkpoint.
        task: The task.
        params: N of the prediction.
        tokens: D of the prediction.
        seed: Seed of the bootstrap.

    Returns:
        Plain values for JSON.

    Raises:
        UserError: A column is missing, or the ladder has too few runs or only one D/N.
    """
    made = ladder(table, task)
    rows = np.ones(len(made.params), dtype=bool)
    final = RunTable(
        tuple(str(i) for i in range(len(rows))), tuple(f"{n:.6g}" for n in made.params), made.params, made.tokens,
        6 * made.params * made.tokens, made.loss, source=table.source,
    )  # fmt: skip
    refuse_collinear(final, _LAW_PARAMETERS)
    problem = Problem.of(made.params, made.tokens, made.loss)
    first = parametric.fit(problem, seed, starts=8)
    second = _fit_sigmoid(made, np.ones(len(rows)), anchored=True)
    loss = float(law.loss(first.theta, params, tokens))
    own = float(sigmoid(second, loss))
    many_loss, many = _chain(made, first, second, params, tokens, seed)
    return {
        "task": task.name, "loss_column": task.loss, "accuracy_column": task.accuracy, "runs": len(rows),
        "params": params, "tokens": tokens,
        "loss": {"value": loss, "interval": interval(many_loss), "interval_80": interval(many_loss, 0.8)},
        "accuracy": {"value": own, "interval": interval(many), "interval_80": interval(many, 0.8)},
        "loss_law": dict(zip(law.NAMES, law.natural(first.theta).tolist(), strict=True)),
        "accuracy_law": dict(zip(("a", "l0", "k", "b"), second.tolist(), strict=True)),
        "residuals": {"loss": float(np.std(first.residuals)), "accuracy": float(np.std(_residual(made, second)))},
        "theta": first.theta.tolist(), "replicates": pack(many),
    }  # fmt: skip


def _chain(
    made: Ladder, first: parametric.ParametricFit, second: FloatArray, params: float, tokens: float, seed: int
) -> tuple[FloatArray, FloatArray]:
    """Bootstrap replicates of the task loss and of the accuracy at (N, D), each of shape (R,)."""
    generator = np.random.default_rng((seed, 4))
    count = len(made.params)
    weights = np.array([np.bincount(generator.integers(0, count, count), minlength=count) for _ in range(REPLICATES)])
    weights = weights[(weights > 0).sum(axis=1) > _LAW_PARAMETERS].astype(np.float64)
    ends = refit(first.problem, weights, first.centred, robust_weights(first.problem, first.centred))
    scale = np.sqrt(count / max(count - _LAW_PARAMETERS, 1))
    noise = generator.choice(first.residuals, len(weights)) * scale
    losses = law.loss(first.problem.uncentred(ends.theta), params, tokens) * np.exp(noise)
    curves = np.array([_fit_sigmoid(made, row, anchored=k % 2 == 0, start=second) for k, row in enumerate(weights)])
    rest = generator.choice(_residual(made, second), len(weights))
    return losses, np.clip(sigmoid(curves, losses) + rest, 0.0, 1.0)


def _fit_sigmoid(made: Ladder, weights: FloatArray, anchored: bool, start: FloatArray | None = None) -> FloatArray:
    """Fit the second law.

    Args:
        made: The ladder.
        weights: Weight of each run, shape (r,).
        anchored: Whether to add the point of accuracy 1 at loss 0.
        start: Parameters to start from; None: for the full fit, default ones.

    Returns:
        Parameters (a, l0, k, b), shape (4,).
    """
    # Replicates start from the full fit, and use only every fourth moving average, since neighbours overlap.
    every = 1 if start is None else AVERAGE - 1
    x = np.concatenate([*(one[::-every] for one in made.smooth_loss), np.zeros(int(anchored))])
    y = np.concatenate([*(one[::-every] for one in made.smooth_accuracy), np.ones(int(anchored))])
    w = np.concatenate([
        np.full(len(one[::-every]), np.sqrt(weight)) for one, weight in zip(made.smooth_loss, weights, strict=True)
    ])  # fmt: skip
    w = np.concatenate([w, np.full(int(anchored), every**-0.5)])
    used = w > 0
    low, high = (np.array(end) for end in _BOUNDS)
    begin = np.clip(np.array(_START) if start is None else start, low + 1e-9, np.minimum(high, 1e6) - 1e-9)

    def jacobian(at: FloatArray) -> FloatArray:
        with np.errstate(over="ignore"):
            share = 1 / (1 + np.exp(-at[2] * (x[used] - at[1])))
        slope = at[0] * share * (1 - share)
        return np.column_stack([share, -slope * at[2], slope * (x[used] - at[1]), np.ones(used.sum())]) * w[used, None]

    end = least_squares(
        lambda at: (sigmoid(at, x[used]) - y[used]) * w[used], begin, jac=jacobian, bounds=(low, high), max_nfev=500
    )
    return np.asarray(end.x, dtype=np.float64)


def _residual(made: Ladder, second: FloatArray) -> npt.NDArray[np.float64]:
    return np.concatenate(made.smooth_accuracy) - sigmoid(second, np.concatenate(made.smooth_loss))
