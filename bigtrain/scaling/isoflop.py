"""Approach 2: parabolas of the loss in ln D and in ln N near the minimum of each budget, and lines through the minima.

An IsoFLOP curve is a parabola only near its minimum. The parabolas of a budget are therefore fitted to a window: the
points around the lowest one whose loss is at most 10 % above it, without a higher point in between, and at least two
points on each side if there are any. `IsoFlop.sensitivity` shows how the lines change with this rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bigtrain.config import UserError
from bigtrain.scaling.bootstrap import draw_weights
from bigtrain.scaling.law import FloatArray
from bigtrain.scaling.lines import Lines, line
from bigtrain.scaling.runs.table import RunTable

SAME_BUDGET = 1.1
"""Runs belong to one budget if their FLOPs are less than this factor above those of its smallest run."""
MIN_POINTS, MIN_BUDGETS = 4, 3
WINDOW = 0.10
"""Relative height of a window above its lowest point."""
WINDOWS = (0.03, 0.05, WINDOW, 0.20, float("inf"))
"""Heights of windows for `IsoFlop.sensitivity`; the last one takes all points of a budget."""
MIN_SIDE = 2
"""Least number of points of a window on each side of the lowest point, if the budget has as many."""
_SHOWN = 4


@dataclass(frozen=True)
class Budget:
    """The runs of one budget, and the parabolas fitted to its window."""

    flops: float
    """Geometric mean of the runs' FLOPs."""
    rows: npt.NDArray[np.int64]
    """Indices of the budget's rows in the table."""
    window: npt.NDArray[np.int64]
    """Indices of the rows to which the parabolas are fitted."""
    params: float
    """N at the minimum."""
    tokens: float
    """D at the minimum."""
    loss: float
    """Loss at the minimum of the parabola in ln D."""
    parabola: tuple[float, float, float]
    """Coefficients of the parabola in ln D, the highest power first."""
    refused: str = ""
    """Why the budget has no minimum; empty if it has one."""


@dataclass(frozen=True)
class IsoFlop:
    """The budgets, and the lines through their minima."""

    budgets: tuple[Budget, ...]
    lines: Lines
    replicates: FloatArray
    """Slope and intercept of ln N, then of ln D, shape (R, 4); NaN if fewer than three budgets have a minimum."""
    minima: FloatArray
    """Loss at the minimum of each budget that is not refused, shape (R, budgets); NaN if there is no minimum."""
    sensitivity: tuple[tuple[str, Lines | None], ...]
    """Lines from other windows and from interpolation, by name; None if fewer than three budgets have a minimum."""


def fit(table: RunTable, clusters: npt.NDArray[np.int64], seed: int, replicates: int) -> IsoFlop:
    """Find the minimum of each budget, and fit the lines through the minima, with bootstrap replicates.

    Args:
        table: The runs.
        clusters: Cluster of each run, shape (n,), numbered from 0.
        seed: Seed of the bootstrap.
        replicates: Number R of bootstrap replicates.

    Raises:
        UserError: Fewer than three budgets, or fewer than half of them, have a minimum inside their points.
    """
    found = budgets_of(table.flops)
    budgets = tuple(_budget(table, rows, WINDOW) for rows in found)
    good = [budget for budget in budgets if not budget.refused]
    if len(good) < max(MIN_BUDGETS, len(budgets) / 2):
        bad = [f"{budget.flops:.3g} FLOPs: {budget.refused}" for budget in budgets if budget.refused]
        reasons = "; ".join(bad[:_SHOWN]) + (f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else "")
        raise UserError(
            f"{len(good)} of {len(budgets)} budgets with {MIN_POINTS} or more runs have a minimum, but approach 2 "
            f"needs at least {MIN_BUDGETS}, and half of them" + (f" ({reasons})" if reasons else ""),
            table.source, f"Train at least {MIN_POINTS} sizes at each of {MIN_BUDGETS} equal budgets of FLOPs.",
        )  # fmt: skip
    weights = draw_weights(clusters, seed, np.arange(replicates))
    ends, minima = _replicates(table, good, weights)
    return IsoFlop(budgets, _lines(good), ends, minima, tuple(_sensitivity(table, found)))


def _lines(good: list[Budget]) -> Lines:
    ln_c = np.log([budget.flops for budget in good])
    return Lines(
        *line(ln_c, np.log([budget.params for budget in good])), *line(ln_c, np.log([budget.tokens for budget in good]))
    )


def _sensitivity(table: RunTable, found: list[npt.NDArray[np.int64]]) -> list[tuple[str, Lines | None]]:
    out: list[tuple[str, Lines | None]] = []
    for height in WINDOWS:
        good = [budget for budget in (_budget(table, rows, height) for rows in found) if not budget.refused]
        name = f"within {height:.0%}" if np.isfinite(height) else "all points"
        out.append((name, _lines(good) if len(good) >= MIN_BUDGETS else None))
    points = [_interpolated(table, rows) for rows in found]
    known = np.array([point for point in points if point is not None])
    if len(known) >= MIN_BUDGETS:
        out.append(("interpolation", Lines(*line(known[:, 0], known[:, 1]), *line(known[:, 0], known[:, 2]))))
    return out


def _interpolated(table: RunTable, rows: npt.NDArray[np.int64]) -> tuple[float, float, float] | None:
    """ln C, ln N and ln D at the minimum of an Akima interpolation through all points (Porian et al. 2024).

    None if there are too few points, or the lowest one lies at an end.
    """
    from scipy.interpolate import Akima1DInterpolator

    minima = []
    for column in (table.params, table.tokens):
        x, first = np.unique(np.log(column[rows]), return_index=True)
        y = np.log(table.loss[rows][first])
        lowest = int(np.argmin(y))
        if len(x) < MIN_POINTS or lowest in (0, len(x) - 1):
            return None
        at = np.linspace(x[lowest - 1], x[lowest + 1], 512)
        minima.append(float(at[int(np.argmin(Akima1DInterpolator(x, y)(at)))]))
    return float(np.log(table.flops[rows]).mean()), minima[0], minima[1]


def budgets_of(flops: FloatArray) -> list[npt.NDArray[np.int64]]:
    """Indices of the rows of each budget, by rising FLOPs; budgets with fewer than four runs are skipped."""
    order = np.argsort(flops, kind="stable")
    found: list[list[int]] = []
    for i in order.tolist():
        if not found or flops[i] >= flops[found[-1][0]] * SAME_BUDGET:
            found.append([])
        found[-1].append(i)
    return [np.array(rows) for rows in found if len(rows) >= MIN_POINTS]


def window_of(x: FloatArray, y: FloatArray, height: float) -> npt.NDArray[np.int64]:
    """Indices, by rising x, of the points of a window around the lowest y.

    Args:
        x: ln D of the points, shape (n,).
        y: Losses of the points, shape (n,).
        height: Relative height of the window above the lowest y.
    """
    order = np.argsort(x, kind="stable")
    low = y[order]
    middle = int(np.argmin(low))
    inside = low <= low[middle] * (1 + height)
    first, last = middle, middle
    while first > 0 and (inside[first - 1] or middle - first < MIN_SIDE):
        first -= 1
    while last < len(order) - 1 and (inside[last + 1] or last - middle < MIN_SIDE):
        last += 1
    return np.asarray(order[first : last + 1], dtype=np.int64)


def _budget(table: RunTable, rows: npt.NDArray[np.int64], height: float) -> Budget:
    window = rows[window_of(np.log(table.tokens[rows]), table.loss[rows], height)]
    ln_n, ln_d, losses = np.log(table.params[window]), np.log(table.tokens[window]), table.loss[window]
    flops = float(np.exp(np.log(table.flops[rows]).mean()))
    ones = np.ones((1, len(window)))
    (tokens,), (refused_d,), (coefficients,) = _minima(ln_d, losses, ones)
    (params,), (refused_n,), _ = _minima(ln_n, losses, ones)
    refused = _REASONS[max(int(refused_d), int(refused_n))]
    at = float(np.polyval(coefficients, tokens)) if np.isfinite(tokens) else float("nan")
    a, b, c = (float(value) for value in coefficients)
    return Budget(flops, rows, window, _exp(params), _exp(tokens), at, (a, b, c), refused)


def _exp(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(value))


_REASONS = ("", "its minimum lies at the edge of its points", "its parabola opens downward", "too few different runs")


def _minima(x: FloatArray, y: FloatArray, weights: FloatArray) -> tuple[FloatArray, npt.NDArray[np.int64], FloatArray]:
    """Fit R weighted parabolas and find their minima.

    Args:
        x: ln D or ln N of the points, shape (n,).
        y: Losses of the points, shape (n,).
        weights: Weights of the points, shape (R, n).

    Returns:
        x at the minimum, shape (R,); the reason why it is not a minimum, as an index into _REASONS, shape (R,); and
        the coefficients, the highest power first, shape (R, 3).
    """
    middle, spread = x.mean(), max(float(np.ptp(x)), 1e-12)
    design = np.column_stack([((x - middle) / spread) ** 2, (x - middle) / spread, np.ones_like(x)])
    gram = np.einsum("rn,ni,nj->rij", weights, design, design)
    moment = np.einsum("rn,ni,n->ri", weights, design, y)
    distinct = np.array([len(np.unique(x[row > 0])) for row in weights])
    gram[distinct < 3] = np.eye(3)
    a, b, c = np.linalg.solve(gram, moment[..., None])[..., 0].T
    with np.errstate(divide="ignore", invalid="ignore"):
        at = -b / (2 * a)
    minimum = middle + spread * at
    low = np.array([x[row > 0].min(initial=np.inf) for row in weights])
    high = np.array([x[row > 0].max(initial=-np.inf) for row in weights])
    reason = np.where((minimum <= low) | (minimum >= high), 1, 0)
    reason = np.where(a <= 0, 2, reason)
    reason = np.where(distinct < 3, 3, reason)
    plain = np.column_stack([
        a / spread**2, b / spread - 2 * a * middle / spread**2, c - b * middle / spread + a * middle**2 / spread**2,
    ])  # fmt: skip
    return minimum, reason, plain


def _replicates(table: RunTable, budgets: list[Budget], weights: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Lines of R resamples, shape (R, 4), and losses at the minima, shape (R, budgets).

    A line skips the budgets that have no minimum in the resample; their losses are NaN.
    """
    ln_c = np.log([budget.flops for budget in budgets])
    minima, losses = {}, np.empty((0, 0))
    for name, column in (("params", np.log(table.params)), ("tokens", np.log(table.tokens))):
        found = [_minima(column[b.window], table.loss[b.window], weights[:, b.window]) for b in budgets]
        at = np.stack([one[0] for one in found], axis=1)
        minima[name] = np.where(np.stack([one[1] for one in found], axis=1) == 0, at, np.nan)
        curves = np.stack([one[2] for one in found], axis=1)
        with np.errstate(over="ignore", invalid="ignore"):
            losses = curves[..., 0] * minima[name] ** 2 + curves[..., 1] * minima[name] + curves[..., 2]
    known = np.isfinite(minima["params"]) & np.isfinite(minima["tokens"])
    out = np.full((len(weights), 4), np.nan)
    for k in np.flatnonzero(known.sum(axis=1) >= MIN_BUDGETS):
        rows = known[k]
        x = ln_c[rows]
        out[k] = Lines(*line(x, minima["params"][k, rows]), *line(x, minima["tokens"][k, rows])).as_array()
    return out, np.where(known, losses, np.nan)
