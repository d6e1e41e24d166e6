"""Approach 1: the lower convex hull of all training curves in (ln FLOPs, ln loss), and lines through its points."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bigtrain.config import UserError
from bigtrain.scaling.bootstrap import draw_weights
from bigtrain.scaling.law import FloatArray
from bigtrain.scaling.lines import Lines, line
from bigtrain.scaling.runs.table import RunTable

MIN_POINTS = 4
MIN_SPAN = 3.0
"""Least ratio of FLOPs between the two ends of the hull."""


@dataclass(frozen=True)
class Envelope:
    """The points of the hull, and the lines through them."""

    rows: npt.NDArray[np.int64]
    """Indices of the table's rows on the hull, by rising FLOPs."""
    lines: Lines
    replicates: FloatArray
    """Slope and intercept of ln N, then of ln D, shape (R, 4); NaN if a replicate's hull has fewer than two points."""


def fit(table: RunTable, clusters: npt.NDArray[np.int64], seed: int, replicates: int) -> Envelope:
    """Fit the lines through the lower hull of all training curves, with bootstrap replicates.

    Args:
        table: Points of training curves.
        clusters: Cluster of each row, shape (n,), numbered from 0.
        seed: Seed of the bootstrap.
        replicates: Number R of bootstrap replicates.

    Raises:
        UserError: The rows are finished runs without curves, the hull has too few points or spans too few FLOPs, or
            all of its points belong to one model.
    """
    if not table.has_curves():
        raise UserError(
            "The rows are finished runs: without points along their training, the hull follows the grid of N and D",
            table.source, "Give several rows of each run to approach 1, with the run's name in a column such as 'run'.",
        )  # fmt: skip
    rows = hull(np.log(table.flops), np.log(table.loss))
    if len(rows) < MIN_POINTS or table.flops[rows[-1]] < MIN_SPAN * table.flops[rows[0]]:
        raise UserError(
            f"The lower hull of the curves has {len(rows)} points over a factor of "
            f"{table.flops[rows[-1]] / table.flops[rows[0]]:.3g} of FLOPs, too few to fit a line", table.source,
            f"Give {MIN_POINTS} points over a factor of {MIN_SPAN:g} to approach 1: several points of each run's "
            "curve.",
        )  # fmt: skip
    if len({table.group[i] for i in rows}) < 2:
        raise UserError(
            "One model forms the whole hull, so N cannot be fitted against FLOPs",
            table.source,
            "Add models of other sizes.",
        )
    return Envelope(rows, _lines(table, rows), _replicates(table, clusters, seed, replicates))


def hull(x: FloatArray, y: FloatArray) -> npt.NDArray[np.int64]:
    """Indices of the points on the lower convex hull, by rising x, up to the point with the lowest y."""
    kept: list[int] = []
    for i in np.lexsort((y, x)).tolist():
        if kept and x[i] == x[kept[-1]]:
            continue
        while len(kept) > 1:
            a, b = kept[-2], kept[-1]
            if (x[b] - x[a]) * (y[i] - y[a]) > (y[b] - y[a]) * (x[i] - x[a]):
                break
            kept.pop()
        kept.append(i)
    lowest = int(np.argmin(y[kept]))
    return np.array(kept[: lowest + 1], dtype=np.int64)


def _lines(table: RunTable, rows: npt.NDArray[np.int64]) -> Lines:
    ln_c = np.log(table.flops[rows])
    return Lines(*line(ln_c, np.log(table.params[rows])), *line(ln_c, np.log(table.tokens[rows])))


def _replicates(table: RunTable, clusters: npt.NDArray[np.int64], seed: int, count: int) -> FloatArray:
    x, y = np.log(table.flops), np.log(table.loss)
    # A point inside the hull of its own cluster is inside every hull of a resample that has the cluster.
    members = [np.flatnonzero(clusters == c) for c in range(int(clusters.max()) + 1)]
    corners = np.concatenate([rows[hull(x[rows], y[rows])] for rows in members])
    out = np.full((count, 4), np.nan)
    for k, weights in enumerate(draw_weights(clusters, seed, np.arange(count))):
        present = corners[weights[corners] > 0]
        rows = present[hull(x[present], y[present])]
        if len(rows) >= 2:
            out[k] = _lines(table, rows).as_array()
    return out
