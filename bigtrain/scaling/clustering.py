"""The choice of the bootstrap's clusters: the runs of a model, or single runs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import stats

from bigtrain.config import UserError
from bigtrain.scaling import parametric
from bigtrain.scaling.bootstrap import LEAST_CLUSTERS
from bigtrain.scaling.law import FloatArray
from bigtrain.scaling.objective import Problem
from bigtrain.scaling.options import FitOptions
from bigtrain.scaling.runs.table import RunTable, refuse_collinear

ALIKE = 0.05
"""Level of the test whether the residuals of one model's runs are alike."""
_CLIP = 4.0


def choose_clusters(table: RunTable, options: FitOptions) -> tuple[npt.NDArray[np.int64], str, list[str]]:
    """The cluster of each row, the kind of the clusters ("model" or "none"), and warnings.

    With "auto", each model is a cluster if the residuals of one model's runs are alike, by the F test of a one-way
    analysis of variance. This is so for branches that share a trunk, and for points of one curve. Otherwise each run is
    a cluster, since clusters of models would make the intervals wider than necessary.
    """
    models = table.clusters("model")
    count = int(models.max()) + 1
    if options.cluster == "none" or count == len(table):
        return table.clusters("none"), "none", []
    kind: str = options.cluster
    if kind == "auto":
        residuals = _residuals(table, options)
        kind = "model" if residuals is None or alike(residuals, models) else "none"
    if kind == "model" and count < LEAST_CLUSTERS:
        text = (
            f"{count} models are too few to resample: intervals are over single runs, and too narrow if the errors of "
            "a model's runs are correlated"
        )
        return table.clusters("none"), "none", [text]
    return table.clusters(kind), kind, []


def alike(residuals: FloatArray, models: npt.NDArray[np.int64]) -> bool:
    """Whether residuals differ significantly more between models than within a model.

    Args:
        residuals: Log residuals, shape (n,).
        models: Model of each run, shape (n,), numbered from 0.
    """
    scale = 1.4826 * float(np.median(np.abs(residuals))) or 1e-12
    clipped = np.clip(residuals, -_CLIP * scale, _CLIP * scale)
    sizes = np.bincount(models)
    means = np.bincount(models, weights=clipped) / sizes
    within, between = len(models) - len(sizes), len(sizes) - 1
    if within < 2 or between < 1:
        return True
    inside = float(((clipped - means[models]) ** 2).sum()) / within
    outside = float((sizes * (means - clipped.mean()) ** 2).sum()) / between
    return bool(outside > inside * stats.f.ppf(1 - ALIKE, between, within))


def _residuals(table: RunTable, options: FitOptions) -> FloatArray | None:
    problem = Problem.of(table.params, table.tokens, table.loss, "huber", options.delta, options.equal_exponents)
    try:
        refuse_collinear(table, problem.basis.shape[1])
    except UserError:
        return None
    return parametric.fit(problem, options.seed, starts=0).residuals
