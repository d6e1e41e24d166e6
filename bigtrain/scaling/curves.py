"""The loss curve of a new run, predicted from the curves of a sweep, and the correlation of its errors.

Each run of the sweep is a trunk and its branch. Its training loss, divided by the law's loss at the run's end, is
averaged over 40 equal shares of its tokens. The resulting curves of runs with one schedule are almost the same for all
sizes (Qiu et al. 2025). For each share, a polynomial in ln N and ln D/N predicts the logarithm of the new run's ratio.
Its terms are those with the smallest error of prediction of excluded trunks.

Runs with one seed read the same text at the same position, whatever their size. If the new run has a seed of the sweep,
the deviations of that seed's trunks from smooth curves of their own, at the same tokens, predict most of the noise.

The errors of one run are correlated from share to share. Their correlation between shares i and j is modelled as
a + b r^|i-j|, and 1 for i = j: a constant error, one that changes slowly, and noise. The parameters have the highest
likelihood given the errors of excluded trunks.
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
    ((1, 0),),
    ((1, 0), (0, 1)),
    ((1, 0), (0, 1), (0, 2)),
    ((1, 0), (0, 1), (0, 2), (2, 0)),
    ((1, 0), (0, 1), (0, 2), (1, 1)),
    ((1, 0), (0, 1), (0, 2), (1, 1), (2, 0)),
)
"""Polynomials to try: the powers of ln N and ln D/N in each term."""
FIRST_SMOOTH, SMOOTH_POWERS = 3, 4
"""A trunk's own smooth curve is a cubic in the logarithm of the share's number, without the first shares."""
MIN_TEXT = 12
"""Least number of shares that a trunk must cover for its own smooth curve."""
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
    paired: int
    """Number of shares whose noise was predicted from runs with the same seed."""


def predict_curve(
    rows: Sequence[dict[str, Any]], ratios: FloatArray, texts: FloatArray, params: float, tokens: float,
    own_text: FloatArray,
) -> CurveModel | None:  # fmt: skip
    """Predict the curve of a new run; None if the sweep has too few trunks for any polynomial.

    Args:
        rows: The rows of the sweep's runs, with params, tokens, run and parent.
        ratios: ln of the ratio of each run's training loss to the law's loss at its end, shape (n, shares); NaN if
            not known.
        texts: For each run, the noise of its text by other trunks, shape (n, shares); see `text_noise`.
        params: N of the new run.
        tokens: D of the new run.
        own_text: The noise of the new run's text, shape (shares,).
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
            errors = _excluded_errors(design, ratios, variances, trunk)
            known = np.isfinite(errors)
            # The Gaussian likelihood of the errors of excluded trunks, with a variance for each share.
            scale = _rms(errors)
            score = float((np.log(np.broadcast_to(scale, errors.shape)[known])).sum())
            score += 0.5 * float((np.broadcast_to(np.log(variances)[:, None], errors.shape)[known]).sum())
            if best is None or score < best[0]:
                best = score, (powers, design, own[0], variances, errors, 1 - part + part * middle / tokens)
    if best is None:
        return None
    powers, design, own, variances, errors, own_variance = best[1]
    share = _share_of_text(errors, texts / np.sqrt(variances)[:, None])
    paired = np.isfinite(own_text) & (share > 0)
    scale, narrow = _smoothed(_rms(errors)), 1.0
    covered = np.isfinite(texts) & np.isfinite(errors) & (share > 0)
    if covered.any():
        ratios = ratios - share * np.nan_to_num(texts)
        without = _excluded_errors(design, ratios, variances, trunk)
        narrow = min(
            float(_rms((without / scale)[covered][:, None])[0] / _rms((errors / scale)[covered][:, None])[0]), 1.0
        )
        if paired.any():
            errors = np.where(covered, without / narrow, errors)
    correlation, inflation = _correlation(errors / scale)
    centre, leverage = _fit_at(design, ratios, variances, own)
    typical = _typical_leverage(design, variances, trunk)
    deviation = scale * inflation * np.sqrt(np.maximum((own_variance + leverage) / (1 + typical), own_variance))
    return CurveModel(
        centre + share * np.nan_to_num(own_text), np.where(paired, narrow * deviation, deviation), correlation,
        len(set(trunk.tolist())), powers, int(paired.sum()),
    )  # fmt: skip


def _share_of_text(errors: FloatArray, texts: FloatArray) -> float:
    """Which part of the text's noise, as other trunks show it, is in a run's errors: a slope from 0 to 1."""
    known = np.isfinite(errors) & np.isfinite(texts)
    if known.sum() < MIN_TEXT:
        return 0.0
    # The level of a run is no noise of its text.
    level = np.array([one[use].mean() if use.any() else 0.0 for one, use in zip(errors, known, strict=True)])
    error, text = (errors - level[:, None])[known], texts[known]
    return float(np.clip(error @ text / max(float(text @ text), 1e-30), 0.0, 1.0))


@dataclass(frozen=True)
class Trunk:
    """The logged losses of a trunk."""

    seed: object
    tokens: FloatArray
    """Tokens at the end of each logged interval, after a first 0; shape (steps + 1,)."""
    sums: FloatArray
    """Sum of the losses of all tokens so far, of the same shape."""


def read_trunks(sweep: Path, rows: Sequence[dict[str, Any]]) -> dict[str, Trunk]:
    """The trunks of a sweep's runs that have a seed, by name."""
    seeds = {str(row["parent"]): row["seed"] for row in rows if row.get("parent") and row.get("seed") is not None}
    return {
        name: Trunk(seed, *_cumulative(read_run_metrics(sweep / SWEEP_TRIALS / name))) for name, seed in seeds.items()
    }


def text_noise(trunks: dict[str, Trunk], seed: object, tokens: float, without: object = None) -> FloatArray:
    """The noise that a seed's text has in each share of a run, as trunks of the sweep with that seed show it.

    Args:
        trunks: The trunks of the sweep.
        seed: The seed.
        tokens: D of the run whose shares are meant.
        without: Name of a trunk that is not used.

    Returns:
        The mean over the trunks of ln L minus a smooth curve, shape (shares,); NaN where no trunk shows it.
    """
    found = [_deviations(one, tokens) for name, one in trunks.items() if one.seed == seed and name != without]
    many = np.array([one for one in found if one is not None]).reshape(-1, BINS)
    counts = np.isfinite(many).sum(axis=0)
    return np.where(counts > 0, np.nansum(many, axis=0) / np.maximum(counts, 1), np.nan)


def _deviations(trunk: Trunk, tokens: float) -> FloatArray | None:
    """ln L of a trunk in each share of another run's tokens minus a smooth curve, shape (shares,)."""
    at, sums = trunk.tokens, trunk.sums
    edges = np.linspace(0, tokens, BINS + 1)
    covered = int((edges[1:] <= at[-1]).sum())
    if covered < MIN_TEXT or np.diff(at).max(initial=0.0) > tokens / BINS:
        return None
    used = np.arange(FIRST_SMOOTH, covered)
    losses = np.log(np.diff(np.interp(edges, at, sums))[used] / (tokens / BINS))
    basis = np.log(used + 0.5)[:, None] ** np.arange(SMOOTH_POWERS)
    found = np.full(BINS, np.nan)
    found[used] = losses - basis @ np.linalg.lstsq(basis, losses, rcond=None)[0]
    return found


def _polynomial(points: FloatArray, powers: Sequence[tuple[int, int]]) -> FloatArray:
    columns = [points[:, 0] ** n * points[:, 1] ** r for n, r in powers]
    return np.column_stack([np.ones(len(points)), *columns])


def _excluded_errors(
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
    known = np.isfinite(ratios)
    for pattern in np.unique(known, axis=1).T:
        if pattern.sum() < max(MIN_CURVES - 1, design.shape[1] + 1):
            continue
        shares = np.flatnonzero((known == pattern[:, None]).all(axis=0))
        weighted = design[pattern] / variances[pattern, None]
        inverse = np.linalg.pinv(design[pattern].T @ weighted)
        predicted[:, shares] = many @ inverse @ weighted.T @ ratios[np.ix_(pattern, shares)]
        leverage[:, shares] = ((many @ inverse) * many).sum(axis=1)[:, None]
    return (predicted, leverage) if at.ndim == 2 else (predicted[0], leverage[0])


def _typical_leverage(design: FloatArray, variances: FloatArray, trunk: npt.NDArray[np.int64]) -> float:
    """Mean variance of the prediction of an excluded run, over its own variance."""
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


def _correlation(errors: FloatArray) -> tuple[tuple[float, float, float], float]:
    """The parameters of the correlation with the highest likelihood, and the standard deviation of the innovations."""
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
    tokens, sums = _cumulative(logged)
    # Logged intervals do not end where shares end, so the sum of losses at the end of each share is interpolated.
    ends = np.interp(np.linspace(0, end, BINS + 1), tokens, sums)
    means = np.diff(ends) / (end / BINS)
    shares = (np.arange(BINS) + 0.5) * end / BINS
    after = np.minimum(np.searchsorted(tokens, shares), len(tokens) - 1)
    wide = tokens[after] - tokens[np.maximum(after - 1, 0)]
    # A logged interval that covers several shares does not show how the loss falls within it.
    means[(wide > MAX_SPARSE * end / BINS) | (shares > tokens[-1])] = np.nan
    return np.asarray(np.log(means / by_law(float(row["params"]), end)), dtype=np.float64)


def _cumulative(logged: Sequence[dict[str, Any]]) -> tuple[FloatArray, FloatArray]:
    """Tokens, and the sum of losses over them, at each logged step; both begin with 0."""
    tokens, sums = [0.0], [0.0]
    for one in logged:
        if one.get("loss") is not None and float(one["tokens"]) > tokens[-1]:
            sums.append(sums[-1] + float(one["loss"]) * (float(one["tokens"]) - tokens[-1]))
            tokens.append(float(one["tokens"]))
    return np.array(tokens), np.array(sums)


def _whole_curve(sweep: Path, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The logged metrics of a run from step 0: those of its trunk up to the branch's first step, then its own."""
    own = read_run_metrics(sweep / SWEEP_TRIALS / str(row["run"]))
    if not row.get("parent"):
        return own
    trunk = read_run_metrics(sweep / SWEEP_TRIALS / str(row["parent"]))
    return [one for one in trunk if one["step"] <= int(row["parent_step"])] + [
        one for one in own if one["step"] > int(row["parent_step"])
    ]
