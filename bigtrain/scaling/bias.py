"""A test whether the smallest or shortest runs lie above the law, for example because their warm-up is too long.

Each form of bias is an additional column z of the Jacobian of ln L: tokens lost at the start of every run, tokens lost
in proportion to N, and small models whose loss is higher than their size allows. A score test checks whether the
residuals correlate with the part of z that is orthogonal to the columns of the law's five parameters. Its variance is
estimated from the clusters (White 1980), so the noise may differ between runs.

The three scores are strongly correlated. The largest of them is therefore compared with the distribution of the largest
of three correlated normal variables (Dunnett and Sobel 1954); three tests at a third of the level would have less
power. `python -m tests.bench.scaling_bias` prints the share of surfaces that are flagged, and the share that the best
possible test would flag.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from bigtrain.scaling import law
from bigtrain.scaling.batched import refit, robust_weights
from bigtrain.scaling.law import FloatArray
from bigtrain.scaling.parametric import ParametricFit, log_jacobian

LEVEL = 0.04
"""Probability of a false alarm, for all forms together."""
SAMPLES = 20_000
"""Samples of the distribution of the largest score; with so many the critical value varies by about 0.01."""
SHORTEST = 0.25
"""Fraction of the runs, the shortest or smallest, that the refit excludes."""
MIN_LEFT = 8
_CLIP = 4.0


@dataclass(frozen=True)
class Bias:
    """A form of bias that the residuals show, and the law's prediction without the runs that it affects."""

    form: str
    """Name of the form: "short runs", "runs of few tokens a parameter" or "small models"."""
    standard_errors: float
    """The score in units of its standard error."""
    loss_bias: float
    """Estimated excess of the log loss of the most biased run."""
    runs_left_out: int
    """Number of runs that the refit excludes; 0 if too few runs would remain for a refit."""
    target_params: float
    """N* at the target, fitted without the shortest or smallest runs."""
    target_loss: float
    """Loss at the target, fitted without the shortest or smallest runs."""


def suspected(
    fitted: ParametricFit, params: FloatArray, tokens: FloatArray, clusters: npt.NDArray[np.int64], target: float
) -> list[Bias]:
    """The forms of bias that the residuals show, the one with the largest score first.

    Args:
        fitted: The fit of the law.
        params: N of the runs, shape (n,).
        tokens: D of the runs, shape (n,).
        clusters: Cluster of each run, shape (n,), numbered from 0.
        target: The target's FLOPs.
    """
    forms = _forms(fitted, params, tokens)
    problem = fitted.problem
    jacobian = log_jacobian(fitted.centred, problem.ln_n, problem.ln_d) @ problem.basis
    columns = np.column_stack([column for column, _ in forms.values()])
    own = columns - jacobian @ np.linalg.lstsq(jacobian, columns, rcond=None)[0]
    sizes = (own**2).sum(axis=0)
    usable = sizes > 1e-10 * (columns**2).sum(axis=0)
    if not usable.any():
        return []
    scores, effects = zip(*(_score(-fitted.residuals, own[:, j], jacobian, clusters) if usable[j] else (0.0, 0.0)
                            for j in range(len(forms))), strict=True)  # fmt: skip
    unit = own / np.sqrt(np.where(usable, sizes, 1.0))
    critical = _critical(unit[:, usable])
    normal = [_as_normal(score, column, clusters) for score, column in zip(scores, unit.T, strict=True)]
    found = []
    for j, (name, (column, by)) in enumerate(forms.items()):
        if usable[j] and normal[j] > critical:
            keep = by > np.quantile(by, SHORTEST)
            theta, enough = _without(fitted, keep)
            found.append(Bias(
                name, scores[j], float(effects[j] * column.max()), int((~keep).sum()) if enough else 0,
                float(law.optimal_params(theta, target)), float(law.optimal_loss(theta, target)),
            ))  # fmt: skip
    return sorted(found, key=lambda one: -one.standard_errors)


def _forms(fitted: ParametricFit, params: FloatArray, tokens: FloatArray) -> dict[str, tuple[FloatArray, FloatArray]]:
    """For each form, its column of the Jacobian and the quantity that is small for the biased runs, each shape (n,)."""
    theta = fitted.theta
    parts = np.exp([
        theta[0] - theta[3] * np.log(params), theta[1] - theta[4] * np.log(tokens), np.full(len(params), theta[2]),
    ])  # fmt: skip
    share = parts / parts.sum(axis=0)
    few = params / tokens
    return {
        "short runs": (share[1] * theta[4] * tokens.min() / tokens, tokens),
        "runs of few tokens a parameter": (share[1] * theta[4] * few / few.max(), tokens / params),
        "small models": (share[0] * theta[3] * params.min() / params, params),
    }


def _critical(directions: FloatArray) -> float:
    """The value that the largest of k correlated normal scores exceeds with probability `LEVEL` if there is no bias.

    Args:
        directions: The parts of the forms' columns that are orthogonal to the Jacobian, at unit length; shape (n, k).
    """
    values, vectors = np.linalg.eigh(directions.T @ directions)
    sampled = np.random.default_rng(0).normal(size=(SAMPLES, len(values)))
    return float(np.quantile((sampled @ (vectors * np.sqrt(np.maximum(values, 0.0))).T).max(axis=1), 1 - LEVEL))


def _as_normal(score: float, direction: FloatArray, clusters: npt.NDArray[np.int64]) -> float:
    """The score of a normal distribution with the same tail probability as a score of the t distribution.

    The degrees of freedom are the number of clusters, reduced if their weights are unequal (Satterthwaite 1946).
    """
    weight = np.bincount(clusters, weights=direction**2)
    dof = max(float(weight.sum() ** 2 / (weight**2).sum()) if weight.any() else 1.0, 2.0)
    return float(stats.norm.isf(stats.t.sf(score, dof)))


def _score(
    excess: FloatArray, own: FloatArray, jacobian: FloatArray, clusters: npt.NDArray[np.int64]
) -> tuple[float, float]:
    """The score of a form in standard errors, and its coefficient.

    Args:
        excess: Log residuals, measured over predicted, shape (n,).
        own: The part of the form's column that is orthogonal to the Jacobian, shape (n,).
        jacobian: Jacobian of the law in its p free parameters, shape (n, p).
        clusters: Cluster of each run, shape (n,).
    """
    scale = 1.4826 * float(np.median(np.abs(excess))) or 1e-12
    clipped = np.clip(excess, -_CLIP * scale, _CLIP * scale)
    size = float(own @ own)
    rest = clipped - jacobian @ np.linalg.lstsq(jacobian, clipped, rcond=None)[0]
    effect = float(own @ rest) / size
    # HC2 (MacKinnon and White 1985): a high leverage shrinks the residuals, and it is highest at the decisive runs.
    basis = np.linalg.qr(np.column_stack([jacobian, own]))[0]
    rest = rest - effect * own
    left = rest / np.sqrt(np.maximum(1 - (basis**2).sum(axis=1), 0.05))
    sums = np.bincount(clusters, weights=own * left, minlength=int(clusters.max()) + 1)
    alike = size * float(rest @ rest) / max(len(rest) - basis.shape[1], 1)
    deviation = float(np.sqrt(max(len(sums) / max(len(sums) - 1, 1) * float(sums @ sums), alike))) / size
    return (effect / deviation if deviation > 0 else 0.0), effect


def _without(fitted: ParametricFit, keep: npt.NDArray[np.bool_]) -> tuple[FloatArray, bool]:
    if keep.sum() < MIN_LEFT:
        return fitted.theta, False
    weights = keep[None].astype(np.float64)
    ends = refit(fitted.problem, weights, fitted.centred, robust_weights(fitted.problem, fitted.centred))
    return fitted.problem.uncentred(ends.theta)[0], True
