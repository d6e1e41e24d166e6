"""Approach 2: at each budget a parabola of the loss in ln D, and in ln N; then a line through the minima."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bigtrain.config import UserError
from bigtrain.scaling.bootstrap import draw_weights
from bigtrain.scaling.law import FloatArray
from bigtrain.scaling.lines import Lines, line
from bigtrain.scaling.table import RunTable

SAME_BUDGET = 1.1
"""Runs are of one budget where their FLOPs differ by less."""
MIN_POINTS, MIN_BUDGETS = 4, 3
_SHOWN = 4


@dataclass(frozen=True)
class Budget:
    """The runs of one budget, and the parabolas through them."""

    flops: float
    """Geometric mean of its runs."""
    rows: npt.NDArray[np.int64]
    params: float
    """N at the minimum."""
    tokens: float
    """D at the minimum."""
    loss: float
    """At the minimum of the parabola in ln D."""
    parabola: tuple[float, float, float]
    """Coefficients of the loss in ln D, the highest power first."""
    refused: str = ""
    """Why its minimum is none."""


@dataclass(frozen=True)
class IsoFlop:
    """The budgets and the lines through their minima."""

    budgets: tuple[Budget, ...]
    lines: Lines
    replicates: FloatArray
    """Shape (R, 4): slope and intercept of ln N, then of ln D; NaN where fewer than three budgets had a minimum."""


def fit(table: RunTable, clusters: npt.NDArray[np.int64], seed: int, replicates: int) -> IsoFlop:
    """Minima of all budgets, lines and their intervals.

    Raises:
        UserError: Fewer than three budgets whose minimum lies inside its points.
    """
    budgets = tuple(_budget(table, rows) for rows in budgets_of(table.flops))
    good = [budget for budget in budgets if not budget.refused]
    if len(good) < max(MIN_BUDGETS, len(budgets) / 2):
        bad = [f"{budget.flops:.3g} FLOPs: {budget.refused}" for budget in budgets if budget.refused]
        reasons = "; ".join(bad[:_SHOWN]) + (f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else "")
        raise UserError(
            f"{len(good)} of {len(budgets)} budgets of {MIN_POINTS} runs and more have a minimum, approach 2 needs "
            f"{MIN_BUDGETS} and half of them" + (f" ({reasons})" if reasons else ""),
            table.source, f"train at least {MIN_POINTS} sizes at each of {MIN_BUDGETS} equal budgets of FLOPs",
        )  # fmt: skip
    ln_c = np.log([budget.flops for budget in good])
    lines = Lines(
        *line(ln_c, np.log([budget.params for budget in good])), *line(ln_c, np.log([budget.tokens for budget in good]))
    )
    weights = draw_weights(clusters, seed, np.arange(replicates))
    return IsoFlop(budgets, lines, _replicates(table, good, weights))


def budgets_of(flops: FloatArray) -> list[npt.NDArray[np.int64]]:
    """Rows of each budget, by rising FLOPs; a budget of fewer than four runs is no parabola and is left out."""
    order = np.argsort(flops, kind="stable")
    found: list[list[int]] = []
    for i in order.tolist():
        if not found or flops[i] >= flops[found[-1][0]] * SAME_BUDGET:
            found.append([])
        found[-1].append(i)
    return [np.array(rows) for rows in found if len(rows) >= MIN_POINTS]


def _budget(table: RunTable, rows: npt.NDArray[np.int64]) -> Budget:
    ln_n, ln_d, losses = np.log(table.params[rows]), np.log(table.tokens[rows]), table.loss[rows]
    flops = float(np.exp(np.log(table.flops[rows]).mean()))
    ones = np.ones((1, len(rows)))
    (tokens,), (refused_d,), (coefficients,) = _minima(ln_d, losses, ones)
    (params,), (refused_n,), _ = _minima(ln_n, losses, ones)
    refused = _REASONS[max(int(refused_d), int(refused_n))]
    at = float(np.polyval(coefficients, tokens)) if np.isfinite(tokens) else float("nan")
    a, b, c = (float(value) for value in coefficients)
    return Budget(flops, rows, float(np.exp(params)), float(np.exp(tokens)), at, (a, b, c), refused)


_REASONS = ("", "its minimum lies at the edge of its points", "its parabola opens downward", "too few different runs")


def _minima(x: FloatArray, y: FloatArray, weights: FloatArray) -> tuple[FloatArray, npt.NDArray[np.int64], FloatArray]:
    """Where R weighted parabolas have their minima.

    Returns:
        ln D (or ln N) of the minimum (R,), the reason against it as an index into _REASONS (R,), and coefficients
        (R, 3), the highest power first.
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


def _replicates(table: RunTable, budgets: list[Budget], weights: FloatArray) -> FloatArray:
    """Lines of R resamples; a budget without a minimum in one is left out of its line."""
    ln_c = np.log([budget.flops for budget in budgets])
    minima = {}
    for name, column in (("params", np.log(table.params)), ("tokens", np.log(table.tokens))):
        found = [_minima(column[b.rows], table.loss[b.rows], weights[:, b.rows]) for b in budgets]
        at = np.stack([one[0] for one in found], axis=1)
        minima[name] = np.where(np.stack([one[1] for one in found], axis=1) == 0, at, np.nan)
    known = np.isfinite(minima["params"]) & np.isfinite(minima["tokens"])
    out = np.full((len(weights), 4), np.nan)
    for k in np.flatnonzero(known.sum(axis=1) >= MIN_BUDGETS):
        rows = known[k]
        x = ln_c[rows]
        out[k] = Lines(*line(x, minima["params"][k, rows]), *line(x, minima["tokens"][k, rows])).as_array()
    return out
