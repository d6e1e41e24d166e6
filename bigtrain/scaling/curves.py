"""The loss curve of a new run, predicted from the curves of a sweep, and the correlation of its errors.

Each run of the sweep is a trunk and its branch. Its training loss, divided by the law's loss at the run's end, is
averaged over 40 equal shares of its tokens. The resulting curves of runs with one schedule are almost the same for all
sizes (Qiu et al. 2025). For each share, a polynomial in ln N and ln D/N predicts the logarithm of the new run's ratio.
Its terms are those with the smallest error of prediction of trunks that were left out.

The errors of one run are correlated from share to share. Their correlation between shares i and j is modelled as
a + b r^|i-j|, and 1 for i = j: a constant error, one that changes slowly, and noise. The parameters have the highest
likelihood given the errors of trunks that were left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bigtrain.scaling.law import FloatArray
from bigtrain.scaling.runs.readers import SWEEP_TRIALS
from bigtrain.tracking.forecast import BINS, MAX_SPARSE, correlation_matrix
from bigtrain.tracking.metrics import read_run_metrics

MIN_CURVES = 6
NOISE_PARTS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
"""Values to try for the fraction of an error's variance that is inversely proportional to the tokens of a share."""
TERMS: tuple[tuple[tuple[int, int], ...], ...] = (
    ((1, 0), (0, 1)),
    ((1, 0), (0, 1), (0, 2)),
    ((1, 0), (0, 1), (0, 2), (2, 0)),
    ((1, 0), (0, 1), (0, 2), (1, 1)),
    ((1, 0), (0, 1), (0, 2), (1, 1), (2, 0)),
)
"""Polynomials to try: the powers of ln N and ln D/N in each term."""
SMOOTH = 2
"""Standard deviations of a share are averaged over this many shares on each side."""
CORRELATIONS = tuple(
    (a, b, r)
    for a, b, r in itertools.product(
        (0.0, 0.1, 0.2, 0.35, 0.5, 0.7), (0.0, 0.1, 0.2, 0.35, 0.5, 0.7), (0.5, 0.75, 0.9, 0.96)
    )
    if a + b < 0.95
)
"""Values to try for a, b and r."""


@dataclass(frozen=True)
class CurveModel:
    """The prediction of a new run's curve."""

    centre: FloatArray
    """Predicted ln(training loss / the law's loss at the end) of each share, shape (shares,); NaN if not known."""
    deviation: FloatArray
    """Standard deviation of the new run's error of each share, shape (shares,)."""
    correlation: tuple[float, float, float]
    """The parameters a, b and r of the errors' correlation."""
    trunks: int
    """Number of trunks, whose errors are independent."""
    powers: tuple[tuple[int, int], ...]
    """Terms of the polynomial."""


def predict_curve(rows: Sequence[dict[str, Any]], ratios: FloatArray, params: float, tokens: float) -> CurveModel:
    """Predict the curve of a new run.

    Args:
        rows: The rows of the sweep's runs, with params, tokens, run and parent.
        ratios: ln of the ratio of each run's training loss to the law's loss at its end, shape (n, shares); NaN if
            not known.
        params: N of the new run.
        tokens: D of the new run.
    """
    points = np.array([[math.log(row["params"]), math.log(row["tokens"] / row["params"])] for row in rows])
    at = np.array([math.log(params), math.log(tokens / params)])
    names = [str(row.get("parent") or row["run"]) for row in rows]
    trunk = np.unique(names, return_inverse=True)[1]
    counts = np.array([float(row["tokens"]) for row in rows])
    middle = float(np.median(counts))
    best: tuple[float, Any] | None = None
    for powers in TERMS:
        design, own = (_polynomial(one - points.mean(axis=0), powers) for one in (points, at[None]))
        if len(set(trunk.tolist())) < design.shape[1] + 1 or np.linalg.matrix_rank(design) < design.shape[1]:
            continue
        for part in NOISE_PARTS:
            variances = 1 - part + part * middle / counts
            errors = _left_out(design, ratios, variances, trunk)
            known = np.isfinite(errors)
            # The Gaussian likelihood of the errors of left-out trunks, with a variance for each share.
            scale = _rms(errors)
            score = float((np.log(np.broadcast_to(scale, errors.shape)[known])).sum())
            score += 0.5 * float((np.broadcast_to(np.log(variances)[:, None], errors.shape)[known]).sum())
            if best is None or score < best[0]:
                best = score, (powers, design, own[0], variances, errors, 1 - part + part * middle / tokens)
    assert best is not None
    powers, design, own, variances, errors, own_variance = best[1]
    scale = _smoothed(_rms(errors))
    correlation, inflation = _correlation(errors / scale, trunk)
    centre, leverage = _fit_at(design, ratios, variances, own)
    typical = _typical_leverage(design, variances, trunk)
    deviation = scale * inflation * np.sqrt(np.maximum((own_variance + leverage) / (1 + typical), own_variance))
    return CurveModel(centre, deviation, correlation, len(set(trunk.tolist())), powers)


def _polynomial(points: FloatArray, powers: Sequence[tuple[int, int]]) -> FloatArray:
    columns = [points[:, 0] ** n * points[:, 1] ** r for n, r in powers]
    return np.column_stack([np.ones(len(points)), *columns])


def _left_out(
    design: FloatArray, ratios: FloatArray, variances: FloatArray, trunk: npt.NDArray[np.int64]
) -> FloatArray:
    """Errors of each run, predicted without its trunk, over the square root of its relative variance; (n, shares)."""
    errors = np.full(ratios.shape, np.nan)
    for number in np.unique(trunk):
        own, rest = trunk == number, trunk != number
        predicted, _ = _fit_at(design[rest], ratios[rest], variances[rest], design[own])
        errors[own] = (ratios[own] - predicted) / np.sqrt(variances[own])[:, None]
    return errors


def _fit_at(
    design: FloatArray, ratios: FloatArray, variances: FloatArray, at: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """The prediction of each share at some points, shape (..., shares), and its variance over the errors' variance.

    Both are NaN for shares that too few runs have.
    """
    many = np.atleast_2d(at)
    predicted, leverage = np.full((len(many), ratios.shape[1]), np.nan), np.full((len(many), ratios.shape[1]), np.nan)
    for number, column in enumerate(ratios.T):
        used = np.isfinite(column)
        if used.sum() < max(MIN_CURVES - 1, design.shape[1] + 1):
            continue
        weighted = design[used] / variances[used, None]
        inverse = np.linalg.pinv(design[used].T @ weighted)
        predicted[:, number] = many @ inverse @ weighted.T @ column[used]
        leverage[:, number] = ((many @ inverse) * many).sum(axis=1)
    return (predicted, leverage) if at.ndim == 2 else (predicted[0], leverage[0])


def _typical_leverage(design: FloatArray, variances: FloatArray, trunk: npt.NDArray[np.int64]) -> float:
    """Mean variance of the prediction of a left-out run, over its own variance."""
    found = []
    for number in np.unique(trunk):
        own, rest = trunk == number, trunk != number
        inverse = np.linalg.pinv(design[rest].T @ (design[rest] / variances[rest, None]))
        found += (((design[own] @ inverse) * design[own]).sum(axis=1) / variances[own]).tolist()
    return float(np.mean(found))


def _rms(errors: FloatArray) -> FloatArray:
    known = np.isfinite(errors)
    total = np.where(known, errors, 0.0) ** 2
    with np.errstate(invalid="ignore"):
        return np.asarray(np.sqrt(total.sum(axis=0) / np.where(known.sum(axis=0) > 0, known.sum(axis=0), np.nan)))


def _smoothed(scale: FloatArray) -> FloatArray:
    """Root mean squares over neighbouring shares."""
    ends = range(len(scale))
    near = [scale[max(i - SMOOTH, 0) : i + SMOOTH + 1] for i in ends]
    return np.array(
        [math.sqrt(np.nanmean(one**2)) if np.isfinite(scale[i]) else np.nan for i, one in zip(ends, near, strict=True)]
    )


def _correlation(errors: FloatArray, trunk: npt.NDArray[np.int64]) -> tuple[tuple[float, float, float], float]:
    """The parameters of the correlation with the highest likelihood, and by which factor innovations exceed theirs."""
    best: tuple[float, tuple[float, float, float], float] | None = None
    for correlation in CORRELATIONS:
        total, squares, count = 0.0, 0.0, 0
        for one in errors:
            known = np.flatnonzero(np.isfinite(one))
            lower = np.linalg.cholesky(correlation_matrix(correlation, known))
            whitened = np.linalg.solve(lower, one[known])
            total += float(np.log(np.diag(lower)).sum())
            squares += float(whitened @ whitened)
            count += len(known)
        score = total + 0.5 * count * math.log(squares / count)
        if best is None or score < best[0]:
            best = score, correlation, math.sqrt(squares / count)
    assert best is not None
    return best[1], max(best[2], 1.0)


def curve_of(sweep: Path, row: dict[str, Any], by_law: Callable[[float, float], float]) -> FloatArray | None:
    """ln of the ratio of a run's training loss to the law's loss at its end, for each share of its tokens.

    The shape is (shares,), with NaN for a share that was logged too rarely. None if the run has no metrics.
    """
    logged = _whole_curve(sweep, row)
    end = float(row["tokens"])
    if not logged:
        return None
    tokens, sums = [0.0], [0.0]
    for one in logged:
        if one.get("loss") is not None and float(one["tokens"]) > tokens[-1]:
            sums.append(sums[-1] + float(one["loss"]) * (float(one["tokens"]) - tokens[-1]))
            tokens.append(float(one["tokens"]))
    # Logged intervals do not end where shares end, so the sum of losses at the end of each share is interpolated.
    ends = np.interp(np.linspace(0, end, BINS + 1), tokens, sums)
    means = np.diff(ends) / (end / BINS)
    shares = (np.arange(BINS) + 0.5) * end / BINS
    after = np.minimum(np.searchsorted(tokens, shares), len(tokens) - 1)
    wide = np.array(tokens)[after] - np.array(tokens)[np.maximum(after - 1, 0)]
    # A logged interval that covers several shares does not show how the loss falls within it.
    means[(wide > MAX_SPARSE * end / BINS) | (shares > tokens[-1])] = np.nan
    return np.asarray(np.log(means / by_law(float(row["params"]), end)), dtype=np.float64)


def _whole_curve(sweep: Path, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The logged metrics of a run from step 0: those of its trunk up to the branch's first step, then its own."""
    own = read_run_metrics(sweep / SWEEP_TRIALS / str(row["run"]))
    if not row.get("parent"):
        return own
    trunk = read_run_metrics(sweep / SWEEP_TRIALS / str(row["parent"]))
    return [one for one in trunk if one["step"] <= int(row["parent_step"])] + [
        one for one in own if one["step"] > int(row["parent_step"])
    ]
