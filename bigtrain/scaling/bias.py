"""Whether the smallest or shortest runs lie above the law, as a warm-up that is too long for them makes them.

Each form of bias is one more column z of the Jacobian of ln L: tokens lost at the start of every run, tokens lost in
proportion to N, and small models that reach less than their size allows. The score test asks whether the residuals
still go with the part of z that the law's own five parameters cannot imitate; its variance is the clusters' own
(White 1980), so that noise may differ from run to run.
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

LEVEL = 0.01
"""Chance of a false alarm of each form."""
SHORTEST = 0.25
"""Share of the runs, the shortest or smallest, that the refit excludes."""
MIN_LEFT = 8
_CLIP = 4.0


@dataclass(frozen=True)
class Bias:
    """A form of bias that the residuals show, and what the law says without the runs that it concerns."""

    form: str
    standard_errors: float
    """Size of the score in its own deviation."""
    loss_bias: float
    """Estimated excess of the log loss of the most biased run."""
    runs_left_out: int
    target_params: float
    """N* at the target, fitted without the shortest or smallest runs."""
    target_loss: float


def suspected(
    fitted: ParametricFit, params: FloatArray, tokens: FloatArray, clusters: npt.NDArray[np.int64], target: float
) -> list[Bias]:
    """The forms of bias that the residuals show, the clearest first."""
    problem = fitted.problem
    parts = np.exp([
        fitted.theta[0] - fitted.theta[3] * np.log(params), fitted.theta[1] - fitted.theta[4] * np.log(tokens),
        np.full(len(params), fitted.theta[2]),
    ])  # fmt: skip
    share = parts / parts.sum(axis=0)
    forms = {
        "short runs": (share[1] * fitted.theta[4] * tokens.min() / tokens, tokens),
        "runs of few tokens a parameter": (
            share[1] * fitted.theta[4] * (params / tokens) / (params / tokens).max(), tokens / params),
        "small models": (share[0] * fitted.theta[3] * params.min() / params, params),
    }  # fmt: skip
    jacobian = log_jacobian(fitted.centred, problem.ln_n, problem.ln_d) @ problem.basis
    found = []
    for name, (column, by) in forms.items():
        score, effect = _score(-fitted.residuals, column, jacobian, clusters)
        dof = max(int(clusters.max()), 2)
        if score > stats.t.ppf(1 - LEVEL, dof):
            keep = by > np.quantile(by, SHORTEST)
            theta, left = _without(fitted, keep)
            found.append(Bias(
                name, score, float(effect * column.max()), int((~keep).sum()) if left else 0,
                float(law.optimal_params(theta, target)), float(law.optimal_loss(theta, target)),
            ))  # fmt: skip
    return sorted(found, key=lambda one: -one.standard_errors)


def _score(
    excess: FloatArray, column: FloatArray, jacobian: FloatArray, clusters: npt.NDArray[np.int64]
) -> tuple[float, float]:
    """The score of a column in standard errors, and its coefficient."""
    scale = 1.4826 * float(np.median(np.abs(excess))) or 1e-12
    clipped = np.clip(excess, -_CLIP * scale, _CLIP * scale)
    own = column - jacobian @ np.linalg.lstsq(jacobian, column, rcond=None)[0]
    size = float(own @ own)
    if size < 1e-10 * float(column @ column):
        return 0.0, 0.0
    rest = clipped - jacobian @ np.linalg.lstsq(jacobian, clipped, rcond=None)[0]
    effect = float(own @ rest) / size
    # HC2 (MacKinnon and White 1985): the runs that decide have the highest leverage, and the smallest residuals by it.
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
